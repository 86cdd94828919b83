"""Models of every method, pushed by their training runs: loaded with diffusers alone, and with the library."""

import json
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import yaml

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.saved import clean_process
from cm_diffusers.engine.saved.export import save_pipeline
from cm_diffusers.engine.sharing import hub as engine_hub
from cm_diffusers.engine.training.run import train
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.loopback import File
from tests.helpers.training_runs import flags


JVP = {"model_preset": "jvp_tiny"}
RUNS = {
    **{method: (method, {}) for method in OBJECTIVES},
    "sct": ("sct", JVP),
    "mean_flow": ("mean_flow", JVP),
    "scd": ("scd", {"from_scratch": True}),
    "trigflow": ("diffusion", {"interpolant": "trigflow", **JVP}),
    "flow": ("diffusion", {"interpolant": "flow", **JVP}),
    "cd": ("cd", {"num_scales": 12}),
    "ctm": ("ctm", {"solver_steps": 2}),
}
# "alone" hides the library. The snippet on each model's card loads and samples it; then it is saved and loaded again.
# With the library, the folders saved without it load as well, and so do its own classes by `from_pretrained`.
CLIENT = """
import importlib.util, sys
from pathlib import Path
import numpy
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

how, path, *names = sys.argv[1:]
spec = importlib.util.spec_from_file_location("clean_process", path)
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
if how == "alone":
    sys.meta_path.insert(0, clean_process._Hidden())
for name in names:
    card = Path(hf_hub_download(f"tester/{name}", "README.md")).read_text()
    snippets = [part.split("```")[0] for part in card.split("```python\\n")[1:]]
    done = {}
    exec(snippets[-1 if how == "alone" else 0], done)
    assert len(done["images"]) == 4
    pipe = done["pipe"]
    numpy.save(f"{how} {name} hub.npy", clean_process.two_images(pipe))
    pipe.save_pretrained(f"saved {how}/{name}")
    trusting = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    settings = trusting if how == "alone" and len(snippets) > 1 else {}
    folders = [f"saved {how}/{name}"] + [f"saved alone/{name}"] * (how == "library")
    for number, folder in enumerate(folders):
        again = DiffusionPipeline.from_pretrained(folder, **settings)
        numpy.save(f"{how} {name} folder {number}.npy", clean_process.two_images(again))
    if how == "library" and len(snippets) > 1:
        own = type(pipe).from_pretrained(f"tester/{name}")
        numpy.save(f"{how} {name} own class.npy", clean_process.two_images(own))
assert (how == "alone") == ("cm_diffusers" not in sys.modules)
assert (how == "alone") == any("cm_diffusers" in module for module in sys.modules if module.startswith("diffusers_m"))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def train_and_push(api, runs):
    """Train and push a tiny model by every method; returns each model's images from the training process."""
    images = {}

    def save(pipeline, folder, **settings):
        images[folder.parent.name] = clean_process.two_images(pipeline)
        save_pipeline(pipeline, folder, **{**settings, "verify": False})

    with (
        mock.patch.object(engine_hub, "HfApi", lambda: api),
        mock.patch("cm_diffusers.engine.training.product.save_pipeline", save),
    ):
        for name, (method, settings) in RUNS.items():
            if "pretrained_teacher_model" in OBJECTIVES[method].Options.__dataclass_fields__:
                settings = {**settings, "pretrained_teacher_model": runs / "diffusion" / "pipeline"}
            settings = {**settings, "max_train_steps": 2, "push_to_hub": True}
            train(parse_config(flags(runs / name, method, **settings), [method], ""))
    return images


def load_all(hub, runs, how):
    environment = hub.environment(runs / "home", OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", CLIENT, how, clean_process.__file__, *RUNS]
    result = subprocess.run(command, env=environment, cwd=runs, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {path.stem: np.load(path) for path in sorted(runs.glob(f"{how} *.npy"))}


def poison(hub, runs):
    """Replace the code of all models, on the Hub and in folders, by code that ends the process."""
    code = b"raise SystemExit('poison')\n"
    for name in RUNS:
        tree = hub.repository(f"tester/{name}").at("main").tree
        poisoned = {path: File(code) if path.endswith(".py") else file for path, file in tree.items()}
        hub.repository(f"tester/{name}").commit("main", "poison", poisoned)
    paths = list((runs / "saved alone").rglob("*.py"))
    assert paths
    for path in paths:
        path.write_bytes(code)


def numbers_of(text):
    return set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", text))


@pytest.mark.wide
def test_models_of_every_method_load_for_anyone(hub, api, runs):
    images = train_and_push(api, runs)
    for how in ("alone", "library"):
        if how == "library":
            poison(hub, runs)
        loaded = load_all(hub, runs, how)
        assert len(loaded) >= 2 * len(RUNS)
        for name, made in loaded.items():
            assert np.array_equal(made, images[name.split()[1]]), name
    for name in RUNS:
        card = hub.repository(f"tester/{name}").files["README.md"].decode()
        facts = (runs / name / "card.json").read_text()
        said = re.sub(r"(?s)```.*?```|seeds 0, 1, 2", "", card.split("---\n", 2)[2])
        assert len(numbers_of(said)) > 10 and numbers_of(said) <= numbers_of(facts)
        recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
        assert recipe == json.loads(facts)["recipe"]
