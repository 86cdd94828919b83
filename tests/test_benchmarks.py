"""The benchmarks keep up with the library."""

import torch
from accelerate import Accelerator

from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.scripts import load_script


def test_every_method_whose_step_is_timed_takes_one(tmp_path):
    step_cost = load_script("step_cost", "benchmarks")
    assert {method.method or name for name, method in step_cost.METHODS.items()} == set(OBJECTIVES)
    for name in step_cost.METHODS:
        (tmp_path / name).mkdir()
        trainer = step_cost.build_trainer(name, str(tmp_path / name), Accelerator(), 2)
        before = [parameter.clone() for parameter in trainer.objective.network.parameters()]
        trainer._train_step(trainer.data.batches(trainer.spot, 0), Stopping())
        after = trainer.objective.network.parameters()
        assert not all(map(torch.equal, before, after)), name
