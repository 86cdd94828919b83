"""Saved models load with diffusers alone, and with the library without running their code. Saving is atomic."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import diffusers.utils.dynamic_modules_utils as dynamic_modules
import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file

import cm_diffusers
from cm_diffusers import (
    ConsistencyPipeline,
    CTMPipeline,
    CTMScheduler,
    DenoisingPipeline,
    JVPUNet2DModel,
    MeanFlowPipeline,
    MultistepConsistencyScheduler,
    TrigFlowPipeline,
    TrigFlowScheduler,
    TwoTimeModel,
)
from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.saved import clean_process, export
from cm_diffusers.engine.saved.clean_process import describe, two_images
from cm_diffusers.engine.saved.export import save_pipeline, verify_export
from cm_diffusers.engine.training.run import train
from cm_diffusers.models import build_unet
from cm_diffusers.pipelines.travel import _sources, bundle, travelling_files
from tests.helpers.training_runs import flags, run, tensors


ROOT = Path(__file__).resolve().parents[2]


def a_network(preset="tiny", two_times=False):
    torch.manual_seed(0)
    network = build_unet(preset, (8, 8), 1, 10, 0.0)
    network = TwoTimeModel.from_network(network) if two_times else network
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


OURS = {
    "consistency": lambda: ConsistencyPipeline(a_network(), MultistepConsistencyScheduler(time_label="angle")),
    "denoising": lambda: DenoisingPipeline(a_network(), EDMEulerScheduler(), time_label="angle"),
    "trigflow": lambda: TrigFlowPipeline(a_network("jvp_tiny"), TrigFlowScheduler(solver="heun")),
    "mean flow": lambda: MeanFlowPipeline(a_network(two_times=True), FlowMatchEulerDiscreteScheduler()),
    "ctm": lambda: CTMPipeline(a_network(two_times=True), CTMScheduler(gamma=0.5)),
    "ctm jvp": lambda: CTMPipeline(a_network("jvp_tiny", two_times=True), CTMScheduler(time_label="angle")),
}
STOCK = {
    "stock": lambda: ConsistencyModelPipeline(a_network(), CMStochasticIterativeScheduler()),
    # the index says "scheduler: cm_diffusers", but the pipeline's class belongs to diffusers
    "stock with ours": lambda: ConsistencyModelPipeline(a_network(), MultistepConsistencyScheduler()),
}
SPLIT = "ctm jvp"  # the kind with several weight files and a variant


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of all saved pipelines, and their images by kind."""
    folder, images = tmp_path_factory.mktemp("saved"), {}
    for kind, make in {**OURS, **STOCK}.items():
        pipeline = make()
        settings = {"variant": "fp16", "max_shard_size": "100KB"} if kind == SPLIT else {}
        save_pipeline(pipeline, folder / kind, **settings)
        images[kind] = two_images(pipeline)
        assert images[kind].std() > 0.01
    return folder, images


CLIENT = """
import importlib.util, json, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process._Hidden())
import numpy, torch
from diffusers import DiffusionPipeline

def load(folder, **settings):
    if (folder / "pipeline.py").exists():
        settings["custom_pipeline"] = "pipeline"
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **settings)

base, kinds = Path(sys.argv[2]), json.loads(sys.argv[3])
pipelines = {kind: load(base / kind) for kind in kinds}  # all, before the first is used
for kind, pipeline in pipelines.items():
    numpy.save(base / f"{kind}.npy", clean_process.two_images(pipeline))
    pipeline.save_pretrained(base / "again" / kind, **({"max_shard_size": "100KB"} if kind == sys.argv[4] else {}))
    numpy.save(base / f"{kind} again.npy", clean_process.two_images(load(base / "again" / kind)))
half = load(base / sys.argv[4], variant="fp16", dtype=torch.float16)
assert {p.dtype for p in half.unet.parameters()} == {torch.float16}
assert "cm_diffusers" not in sys.modules
"""


@pytest.fixture(scope="module")
def clean(saved, tmp_path_factory):
    """`saved`, after a process without the library has loaded, sampled, saved and loaded every pipeline.

    One more pipeline, "other code", has the names of "ctm jvp" and different code.
    """
    base, images = saved
    shutil.copytree(base / SPLIT, base / "other code")
    for name, old, new in (
        ("pipeline.py", "(sample / 2 + 0.5)", "(sample / 2 + 0.25)"),
        ("unet/cm_diffusers.py", "return x * torch.rsqrt(", "return 0.5 * x * torch.rsqrt("),
    ):
        text = (base / "other code" / name).read_text()
        assert text.count(old) == 1
        (base / "other code" / name).write_text(text.replace(old, new))
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
    kinds = json.dumps([*images, "other code"])
    command = [sys.executable, "-I", "-c", CLIENT, clean_process.__file__, str(base), kinds, SPLIT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cache)
    assert result.returncode == 0, result.stderr
    return base, images


# --- with diffusers alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*OURS, *STOCK])
def test_a_saved_pipeline_makes_the_same_images_where_only_diffusers_is(clean, kind):
    base, images = clean
    assert np.array_equal(np.load(base / f"{kind}.npy"), images[kind])
    assert np.array_equal(np.load(base / f"{kind} again.npy"), images[kind])


@pytest.mark.parametrize("kind", [*OURS, "other code"])
def test_saved_again_there_it_is_the_same_folder(clean, kind):
    base, _ = clean
    again, first = files(base / "again" / kind), files(base / kind)
    variants = {name for name in first if "fp16" in name}
    assert bool(variants) == (kind in (SPLIT, "other code"))
    if kind == "other code":  # its weights were saved in one file
        again, first = ({k: v for k, v in which.items() if "safetensors" not in k} for which in (again, first))
    assert again == {name: data for name, data in first.items() if name not in variants}


def test_folders_with_different_code_are_not_mixed_up(clean):
    base, images = clean
    other = np.load(base / "other code.npy")
    assert np.array_equal(np.load(base / "other code again.npy"), other)
    assert np.abs(other - images[SPLIT]).max() > 0.1


# --- with the library ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
def test_with_the_library_no_code_of_the_folder_runs(saved, tmp_path, kind):
    base, images = saved
    poisoned = tmp_path / kind
    shutil.copytree(base / kind, poisoned)
    code = [*poisoned.rglob("*.py")]
    assert code
    for path in code:
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('poison')\n")
    for cls in (DiffusionPipeline, type(OURS[kind]())):
        pipeline = cls.from_pretrained(poisoned)
        assert type(pipeline) is type(OURS[kind]()) and not (tmp_path / "ran").exists()
        assert np.array_equal(two_images(pipeline), images[kind])
    settings = {"max_shard_size": "100KB"} if kind == SPLIT else {}
    pipeline.save_pretrained(tmp_path / "again", **settings)
    assert files(tmp_path / "again") == {k: v for k, v in files(base / kind).items() if "fp16" not in k}


def test_a_pipeline_of_the_folder_with_components_of_the_library_is_saved_whole(saved, tmp_path, monkeypatch):
    base, images = saved
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(base / "trigflow", **settings)
    assert type(pipeline) is not TrigFlowPipeline and type(pipeline.unet) is JVPUNet2DModel
    pipeline.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(base / "trigflow")


def test_a_compiled_network_is_saved_with_its_code(saved, tmp_path):
    base, _ = saved
    pipeline = OURS["trigflow"]()
    pipeline.unet = torch.compile(pipeline.unet)  # compiled at the first call
    pipeline.save_pretrained(tmp_path)
    assert files(tmp_path) == files(base / "trigflow")


# --- the content of a folder ----------------------------------------------------------------------------------------


def test_the_folders_hold_this_and_nothing_else(saved):
    base, _ = saved
    index, unet, scheduler = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
    weights, code = "unet/diffusion_pytorch_model.safetensors", "{}/cm_diffusers.py"
    assert files(base / "stock").keys() == {index, unet, scheduler, weights}
    assert files(base / "denoising").keys() == {index, unet, scheduler, weights, "pipeline.py"}
    assert files(base / "stock with ours").keys() == {index, unet, scheduler, weights, code.format("scheduler")}
    both = {code.format(part) for part in ("unet", "scheduler")}
    assert files(base / "ctm").keys() == {index, unet, scheduler, weights, "pipeline.py", *both}
    assert files(base / "ctm")[code.format("unet")] == files(base / "ctm")[code.format("scheduler")]
    assert json.loads(files(base / "ctm")[index]) == {
        "_class_name": "CTMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["cm_diffusers", "CTMScheduler"],
        "unet": ["cm_diffusers", "TwoTimeModel"],
        "vae": [None, None],
    }


def test_no_text_names_a_folder_of_this_machine(saved, tmp_path):
    base, _ = saved
    for kind in (*OURS, *STOCK):
        loaded = DiffusionPipeline.from_pretrained(base / kind)
        save_pipeline(loaded, tmp_path / kind)
        for name, data in (*files(base / kind).items(), *files(tmp_path / kind).items()):
            if not name.endswith(".safetensors"):
                for path in (base, tmp_path, ROOT, Path.home(), Path(sys.prefix)):
                    assert str(path) not in data.decode(), (kind, name)
        assert Path(loaded.config["_name_or_path"]) == base / kind  # saving has not changed it


@pytest.mark.parametrize("kind", OURS)
def test_the_code_stands_alone_and_says_what_it_is(kind):
    texts = travelling_files(OURS[kind]())
    assert texts == travelling_files(OURS[kind]()) and "pipeline.py" in texts
    for text in texts.values():
        tree = ast.parse(text)
        roots = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        relative = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not relative and roots <= {"torch", "numpy", "PIL", "diffusers"} | sys.stdlib_module_names
        docstring = ast.get_docstring(tree)
        for words in (f"cm_diffusers {cm_diffusers.__version__}", "Apache-2.0", 'custom_pipeline="pipeline"'):
            assert words in docstring


def test_all_models_and_schedulers_fit_into_one_module():
    classes = [getattr(cm_diffusers, name) for name in cm_diffusers.__all__ if not name.endswith("Pipeline")]
    text = bundle(_sources(classes), "All", "1")
    defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert {cls.__name__ for cls in classes} <= defined


def test_formulas_of_core_travel_with_what_uses_them_and_no_more():
    texts = travelling_files(OURS["ctm"]())
    headings = {name: set(re.findall(r"^# --- cm_diffusers\.core\.(\w+)$", texts[name], re.M)) for name in texts}
    assert headings["pipeline.py"] == {"arrays", "conditions", "guidance", "karras", "measurements", "solvers"}
    assert headings["scheduler/cm_diffusers.py"] == {"arrays", "karras", "parameterisation", "time_labels"}
    assert "def heun_end(" in texts["pipeline.py"] and "def slope_scalings(" in texts["scheduler/cm_diffusers.py"]


def test_modules_are_followed_by_their_full_names_as_by_relative_ones():
    sources = {"cm_diffusers.core.a": A, "cm_diffusers.core.b": "from cm_diffusers.core.a import X\nZ = X\n"}
    sources["cm_diffusers.part.c"] = "from ..core.b import Z\nY = Z\n"
    namespace = {"__file__": __file__, "__name__": "bundled"}
    exec(bundle(sources, "Y", "7"), namespace)
    assert namespace["Y"] == 1


A = '"""About a."""\n\nimport os\nfrom math import pi, e\n\n\n# a comment\nX = 1\n'


def test_modules_are_bundled_with_their_comments_and_merged_imports():
    b = "import os\nfrom math import (\n    pi,\n    tau,\n)\nfrom .a import X\nY = X + pi\n"
    text = bundle({"p.a": A, "p.b": b}, "X and Y", "7", hidden=["X"])
    assert text.startswith('"""X and Y, in one file') and "cm_diffusers 7 " in text
    assert text.count("import os\n") == 1 and "\nfrom math import e, pi, tau\n" in text and "from ." not in text
    assert "# --- p.a\n# About a.\n\n# a comment\nX = 1\n\n\n# --- p.b\n\nY = X + pi\n" in text
    namespace = {"__file__": __file__, "__name__": "bundled"}
    exec(text, namespace)
    assert namespace["Y"] > 4 and "X" not in namespace


@pytest.mark.parametrize(
    "b, message",
    [
        ("X = 2\n", "'X' can't be both 'X of p.a' and 'X of p.b'"),
        ("def X(): ...\n", "'X' can't be both"),
        ("for pi in (): ...\n", "'pi' can't be both 'from math import pi' and 'pi of p.b'"),
        ("from cmath import pi\n", "'pi' can't be both 'from math import pi' and 'from cmath import pi'"),
        ("import cm_diffusers\n", "p.b can't be saved with a pipeline, because of: import cm_diffusers"),
        ("from transformers import pipeline\n", "because of: from transformers import pipeline"),
        ("from .c import Z\n", "because of: from .c import Z"),
        ("from .a import X as Z\n", "because of: from .a import X as Z"),
        ("from .a import pi\n", "because of: from .a import pi"),
        ("from cm_diffusers.core.draws import Draws\n", "because of: from cm_diffusers.core.draws import Draws"),
    ],
)
def test_what_can_not_be_bundled_is_refused(b, message):
    with pytest.raises(ValueError, match=message):
        bundle({"p.a": A, "p.b": b}, "", "")


# --- variants and weight files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_variant_lies_beside_the_full_weights(tmp_path, variant, dtype):
    pipeline = OURS["ctm"]()
    save_pipeline(pipeline, tmp_path / "a", variant=variant)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    half = CTMPipeline.from_pretrained(tmp_path / "a", variant=variant, dtype=dtype).unet.state_dict()
    full = CTMPipeline.from_pretrained(tmp_path / "a").unet.state_dict()
    for key, value in pipeline.unet.state_dict().items():
        assert full[key].equal(value) and half[key].dtype == dtype and half[key].equal(value.to(dtype))
    (path,) = (tmp_path / "a" / "unet").glob(f"*.{variant}.safetensors")
    assert {value.dtype for value in load_file(path).values()} == {dtype}


def test_another_variant_is_refused(tmp_path):
    with pytest.raises(ValueError, match="variant must be one of fp16, bf16; got 'ema'"):
        save_pipeline(OURS["ctm"](), tmp_path / "a", variant="ema")
    assert not [*tmp_path.iterdir()]


def test_weights_are_split_into_several_files(saved):
    base, _ = saved
    names = files(base / SPLIT).keys()
    for mark in ("", ".fp16"):
        index = f"unet/diffusion_pytorch_model.safetensors.index{mark}.json"
        assert index in names
        shards = set(json.loads((base / SPLIT / index).read_text())["weight_map"].values())
        assert len(shards) > 1 and {f"unet/{shard}" for shard in shards} <= names
    expected = OURS[SPLIT]().unet.state_dict()
    half = CTMPipeline.from_pretrained(base / SPLIT, variant="fp16", dtype=torch.float16)
    assert all(half.unet.state_dict()[key].equal(value.half()) for key, value in expected.items())


# --- all or nothing -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step, save):
    """Call `save` and kill it at disk operation number `step`; returns whether it finished before that."""
    steps = []

    def counted(function, after=False):
        def call(*args, **kwargs):
            steps.append(function)
            if len(steps) == step and not after:
                raise Killed
            result = function(*args, **kwargs)
            if len(steps) == step:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((export, "save_with_code"), (os, "fsync"), (os, "rename")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        for owner, name in ((export, "_exchange"), (shutil, "rmtree")):
            patch.setattr(owner, name, counted(getattr(owner, name), after=True))
        try:
            save()
        except Killed:
            return False
    return True


@pytest.mark.wide
def test_a_kill_at_any_moment_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    folder, pipelines = tmp_path / "pipeline", [OURS["denoising"](), OURS["trigflow"]()]
    whole = []
    for pipeline in pipelines:
        save_pipeline(pipeline, folder)
        whole.append(files(folder))
    seen, step, ended = [], 0, False
    while not ended:
        step += 1
        save_pipeline(pipelines[0], folder)
        assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
        ended = killed_at(monkeypatch, step, lambda: save_pipeline(pipelines[1], folder))
        seen.append(whole.index(files(folder)))
    assert seen == sorted(seen) and seen.count(0) > 5 and seen.count(1) > 2


def test_where_folders_can_not_be_exchanged_the_new_one_replaces_the_old_one(saved, tmp_path, monkeypatch):
    base, _ = saved
    monkeypatch.setattr(export, "_exchange", lambda a, b: False)
    for kind in ("denoising", "trigflow"):
        save_pipeline(OURS[kind](), tmp_path / "a")
        assert files(tmp_path / "a") == files(base / kind) and [p.name for p in tmp_path.iterdir()] == ["a"]


# --- verified -------------------------------------------------------------------------------------------------------


def test_a_run_verifies_what_it_exports(tmp_path, monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(export, "verify_export", lambda *args: (verify_export(*args), calls.append(args[1])))
    train(parse_config(flags(tmp_path, "ect", time_label="angle", max_train_steps=1), ["ect"], ""))
    assert calls == [tmp_path / ".tmp-pipeline"] and (tmp_path / "pipeline" / "pipeline.py").exists()


@pytest.mark.wide
def test_a_model_that_does_not_load_is_refused(saved, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(saved[0] / "trigflow", folder)
    (folder / "pipeline.py").write_text("import cm_diffusers.pipelines\n")
    with pytest.raises(RuntimeError, match="does not load with diffusers alone(.|\n)*it is hidden here"):
        verify_export(OURS["trigflow"](), folder)


def change_weights(pipeline):
    pipeline.unet.conv_out.weight.data[0, 0, 0, 0] += 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        (change_weights, "The unet .* differs in 1 values.* weight conv_out.weight should be 'torch.float32"),
        (lambda p: p.scheduler.register_to_config(rho=5.0), "The scheduler .* rho should be 7.0, but .* 5.0"),
        (
            lambda p: p.register_to_config(time_label="log_sigma"),
            "The pipeline .* time_label should be 'angle', but is loaded as 'log",
        ),
        (lambda p: p.unet.register_forward_hook(lambda *args: (args[2][0] + 0.1,)), "differ by up to 1, above"),
    ],
)
def test_another_model_than_the_one_to_be_saved_is_refused(monkeypatch, tmp_path, change, message):
    def another(command, **settings):
        pipeline, results = OURS["denoising"](), Path(command[4])
        change(pipeline)
        (results / "facts.json").write_text(json.dumps(describe(pipeline)))
        np.save(results / "images.npy", two_images(pipeline))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", another)
    with pytest.raises(RuntimeError, match=message):
        verify_export(OURS["denoising"](), tmp_path)


def test_a_run_whose_model_is_refused_keeps_the_old_one_and_exports_again(tmp_path, monkeypatch):
    run(tmp_path, max_train_steps=3)
    before = files(tmp_path / "pipeline")

    def refuse(pipeline, folder):
        raise RuntimeError("not the same")

    with monkeypatch.context() as patch:
        patch.setattr(export, "verify_export", refuse)
        with pytest.raises(RuntimeError, match="not the same"):
            train(parse_config(flags(tmp_path, max_train_steps=4), ["ect"], ""))
    assert files(tmp_path / "pipeline") == before and (tmp_path / "checkpoint-4").exists()
    run(tmp_path, max_train_steps=4)
    assert files(tmp_path / "pipeline") != before


# --- which weights --------------------------------------------------------------------------------------------------


def test_the_average_is_exported_or_the_online_weights_on_request(tmp_path):
    for choice, group in (("ema", "ema_halflife_500kimg"), ("online", "model"), ("ema", "ema_halflife_500kimg")):
        run(tmp_path, export_weights=choice)  # the first run trains
        exported, kept = (
            load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"),
            tensors(tmp_path),
        )
        assert all(value.equal(kept[group, key]) for key, value in exported.items())
