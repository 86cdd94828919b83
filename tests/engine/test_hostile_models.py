"""Hostile model folders: whatever they name, nothing outside the folder is read, imported or run."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from cm_diffusers import CTMPipeline, CTMScheduler, TwoTimeModel
from cm_diffusers.engine.saved.export import save_pipeline
from cm_diffusers.models import build_unet
from cm_diffusers.sampling import load_pipeline


INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
OUTSIDE = [
    "../evil",
    "../../outside/evil",
    "/OUTSIDE/evil",
    "C:\\evil",
    "..\\evil",
    "‥/evil",
    "unet/../../outside/evil",
]

# loads every folder under an audit hook; reports the message of each and its accesses beyond a sound folder's
CLIENT = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import cm_diffusers
from cm_diffusers.sampling import load_pipeline
root, sound, *folders = sys.argv[1:]
touched, watching = [], False

def hook(event, args):
    if watching and event in ("import", "open", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        touched.append((event, str(args[0])))
sys.addaudithook(hook)

def attempt(load, folder):
    touched.clear()
    known = set(sys.modules)
    try:
        load(folder)
        said = "loaded"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    opened = [name for event, name in touched if event == "open" and name.startswith(root)]
    inside = str(Path(folder).resolve())
    outside = [name for name in opened if not str(Path(name).resolve()).startswith(inside)]
    other = [t for t in touched if t[0] != "open" and not (t[0] == "import" and t[1] in known)]
    return {"said": said, "outside": outside, "other": other}

watching = True
ways = {"load_pipeline": load_pipeline, "from_pretrained": cm_diffusers.CTMPipeline.from_pretrained}
report = {folder: {name: attempt(load, folder) for name, load in ways.items()} for folder in (sound, *folders)}
assert [way["said"] for way in report.pop(sound).values()] == ["loaded", "loaded"]
print(json.dumps(report))
"""


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder, target):
    """Weights with an index that names `target`."""
    os.rename(folder / WEIGHTS, folder / "unet/real.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": target}}))


def link(folder, name):
    outside = folder.parent.parent / "outside" / os.path.basename(name)
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


CASES = {
    **{f"library {text}": lambda f, t=text: edit(f, "model_index.json", unet=[t, "TwoTimeModel"]) for text in OUTSIDE},
    **{f"class {text}": lambda f, t=text: edit(f, "model_index.json", unet=["diffusers", t]) for text in OUTSIDE},
    **{
        f"component {t}": lambda f, t=t: edit(f, "model_index.json", **{t: ["diffusers", "UNet2DModel"]})
        for t in OUTSIDE
    },
    **{f"pipeline {text}": lambda f, t=text: edit(f, "model_index.json", _class_name=t) for text in OUTSIDE},
    **{
        f"pipeline file {t}": lambda f, t=t: edit(f, "model_index.json", _class_name=[t, "CTMPipeline"])
        for t in OUTSIDE
    },
    **{f"shard {text}": lambda f, t=text: shard(f, t + ".safetensors") for text in OUTSIDE},
    **{f"auto_map {t}": lambda f, t=t: edit(f, "unet/config.json", auto_map={"AutoModel": f"{t}.X"}) for t in OUTSIDE},
    **{f"network of {t}": lambda f, t=t: edit(f, "unet/config.json", network_class=t) for t in OUTSIDE},
    "os.system": lambda f: edit(f, "model_index.json", unet=["os", "system"]),
    "subprocess.Popen": lambda f: edit(f, "model_index.json", scheduler=["subprocess", "Popen"]),
    "evil module": lambda f: edit(f, "model_index.json", unet=["evil", "Evil"]),
    "evil module beside": lambda f: edit(f, "model_index.json", unet=["unet.evil", "Evil"]),
    "transformers": lambda f: edit(f, "model_index.json", unet=["transformers", "AutoModel"]),
    "custom pipeline": lambda f: edit(f, "model_index.json", custom_pipeline="evil"),
    "linked weights": lambda f: link(f, WEIGHTS),
    "linked config": lambda f: link(f, "unet/config.json"),
    "linked scheduler": lambda f: link(f, "scheduler/scheduler_config.json"),
    "linked folder": lambda f: link(f, "unet"),
    "nested": lambda f: (f / "model_index.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "not json": lambda f: (f / "unet/config.json").write_text("__import__('evil')"),
    "a list": lambda f: (f / "model_index.json").write_text("[]"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The outcome of each case, and the folder of all models."""
    root = tmp_path_factory.mktemp("models").resolve()
    (root / "outside").mkdir()
    pipeline = CTMPipeline(TwoTimeModel.from_network(build_unet("jvp_tiny", (8, 8), 1)), CTMScheduler())
    save_pipeline(pipeline, root / "sound")
    mark = f"open({str(root / 'marker')!r}, 'w')"
    for place in ("sound", "sound/unet", "sound/scheduler", "outside", "."):
        (root / place / "evil.py").write_text(mark)
    for path in (root / "sound").rglob("*.py"):
        path.write_text(mark)
    for name in ("evil.safetensors", "evil"):
        shutil.copy(root / "sound" / WEIGHTS, root / "outside" / name)
    folders = []
    for number, break_it in enumerate(CASES.values()):
        folder = root / "cases" / str(number)
        shutil.copytree(root / "sound", folder)
        break_it(folder)
        for path in folder.rglob("*.json"):
            path.write_text(path.read_text().replace("/OUTSIDE", str(root / "outside")))
        folders.append(str(folder))
    command = [sys.executable, "-c", CLIENT, str(root), str(root / "sound"), *folders]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    return {name: found[folder] for name, folder in zip(CASES, folders)}, root


IGNORED = ("component", "auto_map", "custom pipeline")  # their additions are ignored, and the model loads


@pytest.mark.parametrize("case", CASES)
def test_nothing_outside_a_model_is_touched(report, case):
    found, root = report
    assert not (root / "marker").exists()
    ours = found[case]["load_pipeline"]
    assert ours["said"] == "loaded" if case.startswith(IGNORED) else ours["said"].startswith("ValueError: model '")
    for way in [ours] if case.startswith("linked") else found[case].values():
        assert way["outside"] == way["other"] == []


def test_the_hook_sees_what_is_touched(report):
    """diffusers follows links, which shows that the hook sees accesses."""
    assert report[0]["linked config"]["from_pretrained"]["outside"]


def test_a_model_in_the_cache_of_the_hub_is_made_of_links(tmp_path):
    pipeline = CTMPipeline(TwoTimeModel.from_network(build_unet("jvp_tiny", (8, 8), 1)), CTMScheduler())
    snapshot = tmp_path / "models--tester--model" / "snapshots" / "1234"
    save_pipeline(pipeline, snapshot)
    blobs = tmp_path / "models--tester--model" / "blobs"
    blobs.mkdir()
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert load_pipeline(str(snapshot)).num_classes is None
