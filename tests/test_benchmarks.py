"""The benchmarks work with the current library."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.models import build_unet, fused
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.scripts import load_script
from tests.helpers.training_runs import run


def test_every_method_whose_step_is_timed_takes_one(tmp_path):
    step_cost = load_script("step_cost", "benchmarks")
    assert {method.method or name for name, method in step_cost.METHODS.items()} == set(OBJECTIVES)
    for name in step_cost.METHODS:
        (tmp_path / name).mkdir()
        trainer = step_cost.build_trainer(name, str(tmp_path / name), Accelerator(), 2)
        before = [parameter.clone() for parameter in trainer.objective.network.parameters()]
        trainer.take_step(trainer.data.batches(trainer.share, 0), Stopping())
        after = trainer.objective.network.parameters()
        assert not all(map(torch.equal, before, after)), name


def test_the_text_to_image_step_that_is_timed_changes_the_adapter(tmp_path):
    text_step = load_script("text_step", "benchmarks")
    trainer = text_step.build_trainer(str(tmp_path), Accelerator(), 2)
    network = trainer.objective.network
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    trainer.take_step(trainer.data.batches(trainer.share, 0), Stopping())
    changed = {name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("lora" in name for name in changed)


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_can_be_read(path):
    load_script(path.stem, path.parent.relative_to(ROOT))


def test_fused_kernels_keep_half_the_memory_or_less(monkeypatch):
    kept_memory = load_script("kept_memory", "benchmarks")
    network = build_unet("ddpmpp_tiny", (8, 8), 3, 10)
    plain = kept_memory.kept_bytes_per_image(network, 8, torch.bfloat16)
    monkeypatch.setattr(fused, "under_tangent", lambda: True)
    assert 0 < plain < 0.5 * kept_memory.kept_bytes_per_image(network, 8, torch.bfloat16)


@pytest.mark.wide
def test_the_picture_of_the_flat_loss_is_drawn(tmp_path):
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 10, "max_train_steps": 4}
    run(tmp_path, "ect", class_conditional=True, **settings)
    flat_loss = load_script("flat_loss", "benchmarks/experiments")
    found = flat_loss.measure(tmp_path)
    assert list(found) == [1, 2, 3, 4]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    flat_loss.draw(log, found, 2, 2, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
