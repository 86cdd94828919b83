"""The benchmarks keep up with the library."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.objectives import OBJECTIVES


@pytest.fixture
def step_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import step_cost

    yield step_cost
    for name in ("step_cost", "common"):
        sys.modules.pop(name, None)


def test_every_method_whose_step_is_timed_takes_one(step_cost, tmp_path):
    assert {method.method or name for name, method in step_cost.METHODS.items()} == set(OBJECTIVES)
    for name in step_cost.METHODS:
        (tmp_path / name).mkdir()
        trainer = step_cost.build_trainer(name, str(tmp_path / name), Accelerator(), 2)
        before = [parameter.clone() for parameter in trainer.objective.network.parameters()]
        trainer._train_step(trainer.data.batches(trainer.spot, 0), Stopping())
        after = trainer.objective.network.parameters()
        assert not all(map(torch.equal, before, after)), name
