"""A stopped and resumed run equals an uninterrupted one bit for bit, for all methods and starts."""

import shutil

import pytest

from cm_diffusers.engine.training.trainer import Trainer
from tests.helpers.breadth import narrowed
from tests.helpers.method_runs import STARTS, settings_of
from tests.helpers.training_runs import differences, read_log, run


FULL = [
    (method, start, dropout, accumulation, adversary)
    for method, start in STARTS
    for dropout in (0.0, 0.1)
    for accumulation in (1, 2)
    for adversary in ((False, True) if method == "ctm" else (False,))
]


def assert_resumes_exactly(folder, method, settings):
    whole, resumed = folder / "whole", folder / "resumed"
    run(whole, method, **settings)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "log.jsonl", resumed)
    run(resumed, method, **settings)
    assert differences(resumed, whole) == []
    assert read_log(resumed) == read_log(whole)


@pytest.mark.parametrize(
    "method, start",
    narrowed(STARTS, ("ect", "scratch"), ("ctm", "teacher"), ("diffusion", "saved")),
)
def test_every_start_of_every_method_is_resumed_bit_for_bit(models, tmp_path, method, start):
    assert_resumes_exactly(tmp_path, method, settings_of(models, method, start, adversary=method == "ctm"))


@pytest.mark.slow
@pytest.mark.parametrize("method, start, dropout, accumulation, adversary", FULL)
def test_every_combination_is_resumed_bit_for_bit(models, tmp_path, method, start, dropout, accumulation, adversary):
    assert_resumes_exactly(tmp_path, method, settings_of(models, method, start, dropout, accumulation, adversary))


@pytest.mark.parametrize("start", ["scratch", "saved"])
@pytest.mark.parametrize("method", ["ct", "cd", "ctm"])
def test_a_moving_target_drops_as_the_student_does(models, tmp_path, monkeypatch, method, start):
    """A saved model loads in evaluation mode; a target left in that mode would not share the student's masks."""
    seen, fit = [], Trainer.fit

    def watched(self, stopping):
        seen.append(self.objective)
        fit(self, stopping)

    monkeypatch.setattr(Trainer, "fit", watched)
    run(tmp_path, method, **{**settings_of(models, method, start), "max_train_steps": 1})
    for network in (seen[0].network, seen[0].target):
        assert all(module.training for module in network.modules())
    if seen[0].teacher is not None:
        assert not any(module.training for module in seen[0].teacher.network.modules())
