"""The Python blocks of README and docs run unchanged, and the site has a page for every module."""

import pkgutil
import re
import time
from pathlib import Path

import diffusers
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import cm_diffusers
from cm_diffusers import ConsistencyPipeline, CTMPipeline, CTMScheduler, MultistepConsistencyScheduler
from cm_diffusers.models import TwoTimeModel, build_unet
from tests.helpers.stock_text_pipelines import TEXT_TO_IMAGE


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = ["add_a_method.md", "text.md"]  # engine/test_new_method.py and hub/test_text_journey.py run such blocks


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the models in the pages' examples."""
    folder = tmp_path_factory.mktemp("pages")
    unet = build_unet("tiny", (8, 8), 3, num_classes=10)
    ConsistencyPipeline(unet, MultistepConsistencyScheduler()).save_pretrained(folder / "runs/quickstart/pipeline")
    network = TwoTimeModel.from_network(build_unet("tiny", (8, 8), 3))
    CTMPipeline(network, CTMScheduler()).save_pretrained(folder / "runs/trajectory/pipeline")
    return folder


@pytest.fixture
def names(models):
    """The names that the blocks use without defining them."""
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    small = picture.resize((4, 4))
    trajectories = CTMPipeline.from_pretrained(models / "runs/trajectory/pipeline")
    return {
        **dict.fromkeys(("image", "strokes"), picture),
        "grey": picture.convert("L"),
        "mask": Image.fromarray(np.eye(8, dtype=np.uint8) * 255),
        "small": small,
        "noisy": torch.zeros(1, 3, 8, 8),
        "pictures": [picture] * 4,
        "trajectories": trajectories,
    }


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_blocks_run(page, models, names, monkeypatch):
    monkeypatch.chdir(models)
    if page.name == "schedulers.md":
        pipe, inputs = TEXT_TO_IMAGE["lcm"]()
        monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: (inputs["prompt_embeds"], None))
        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda name: pipe)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_the_reference_shows_every_module():
    shown = {
        name
        for page in (ROOT / "docs/reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M)
    }
    packages = ["core", "objectives", "schedulers", "models", "convert", "evaluation", "toys"]
    modules = {
        f"cm_diffusers.{package}.{info.name}"
        for package in packages
        for info in pkgutil.iter_modules([str(Path(cm_diffusers.__file__).parent / package)])
    }
    modules |= {f"pipelines.{path.stem}" for path in (ROOT / "pipelines").glob("*.py")}
    assert modules <= shown
    assert shown - modules == {"cm_diffusers.sampling"}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_in_five_minutes(tmp_path):
    notebook = nbformat.read(ROOT / "docs/notebook.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}})
    began = time.monotonic()
    client.execute()
    print(f"The notebook took {time.monotonic() - began:.0f} seconds.")
    assert (tmp_path / "runs/notebook/metrics.json").is_file()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "error" not in " ".join(output.get("text", "") for output in outputs).lower()
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
