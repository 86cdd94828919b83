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


def test_waits_are_reads_of_the_device_and_blocking_copies_to_it():
    script, device = load_script("waits", "benchmarks"), torch.device("cpu")
    weight, images = torch.ones(3), torch.arange(6)
    script.mark_host([images])

    def step():
        weight.sum().item()  # read
        if (weight > 2).all():  # read
            return
        torch.tensor([1.0, 2.0], device=device)  # copied
        images[:2].float().to(device)  # copied
        images.to(device, non_blocking=True)
        (weight + images[:3].to(device)).max()  # copied
        weight[torch.tensor([0, 2])]  # copied
        weight.cpu().tolist()  # read once
        torch.zeros(3, device=device) + weight.to(torch.float64).new_zeros(3)
        (torch.ones(2) * images[0]).sum().item(), len(images), images.tolist()  # the host's own

    places = script.waits(step)
    assert set(places.values()) == {1} and len(places) == 7
    first = step.__code__.co_firstlineno
    assert sorted(int(place.split(":")[1]) - first for place in places) == [1, 2, 4, 5, 7, 8, 9]


@pytest.mark.wide
def test_the_benchmark_of_a_gpu_shows_that_no_method_waits_in_a_step(tmp_path, monkeypatch):
    gpu, out = load_script("gpu", "benchmarks"), tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--tiny", "--out", str(out), "--sections", "waits", "save"])
    gpu.main()
    rows = json.loads(out.read_text())
    assert not any("error" in row for row in rows) and {row["section"] for row in rows} == {"machine", "waits", "save"}
    counted = {row["name"]: row for row in rows if "waits_per_step" in row}
    assert counted.keys() == OBJECTIVES.keys() and all(row["host_ms"] > 0 for row in counted.values())
    assert counted.pop("ct")["waits_per_step"] <= 1  # its grid grows, here in each of the few steps
    assert {name: row["places"] for name, row in counted.items() if row["waits_per_step"]} == {}


def test_a_failure_is_a_row_and_nothing_starts_after_the_budget(tmp_path, monkeypatch):
    gpu, out = load_script("gpu", "benchmarks"), tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--tiny", "--out", str(out), "--sections", "draws", "save"])
    monkeypatch.setitem(gpu.SECTIONS, "draws", lambda bench: 1 / 0)
    monkeypatch.setitem(gpu.SECTIONS, "save", lambda bench: setattr(bench, "end", 0.0))
    gpu.main()
    assert [row.get("error") for row in json.loads(out.read_text())][1] == "ZeroDivisionError: division by zero"
    monkeypatch.setitem(gpu.SECTIONS, "draws", lambda bench: setattr(bench, "end", 0.0))
    gpu.main()
    assert json.loads(out.read_text())[-1] == {"section": "save", "name": "save", "skipped": "the budget is spent"}


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
