"""The rule of a run's random numbers: recorded in checkpoints, and kept by runs that began with an earlier one."""

import shutil
from pathlib import Path

import pytest
import torch

import cm_diffusers.engine.training.state as state_module
from cm_diffusers.core.draws import Draws, SequentialDraws
from cm_diffusers.engine.checkpoint import newest_checkpoint, save_checkpoint
from cm_diffusers.models.keyed_dropout import KeyedDropout
from cm_diffusers.objectives.diffusion import Diffusion
from tests.helpers.training_runs import differences, read_log, run


SETTINGS = {"model_preset": "ddpmpp_tiny", "dropout": 0.2, "random_flip": True, "augment": 0.3}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A whole run by the first rule."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "Draws", SequentialDraws)
        return run(tmp_path_factory.mktemp("runs") / "begun", "diffusion", **SETTINGS)


def halfway(whole, folder, **changes):
    """A copy of the run at step 3, with changes of its checkpoint's state; None removes an entry."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / "pipeline")
    checkpoint, _ = newest_checkpoint(folder)
    state = {key: value for key, value in {**checkpoint.state, **changes}.items() if value is not None}
    save_checkpoint(folder, checkpoint.step, checkpoint.tensors, state)
    return folder


@pytest.fixture
def seen(monkeypatch):
    """For each step of a run: its draws, the flips' numbers, and the rules of the layers' masks."""
    steps, loss = [], Diffusion.loss

    def watched(self, batch, draws):
        rules = {m.rule for m in self.network.modules() if isinstance(m, KeyedDropout)}
        steps.append((draws, draws.uniform("flip"), draws.normal("noise", (2, 3)), draws.keys("dropout"), rules))
        return loss(self, batch, draws)

    monkeypatch.setattr(Diffusion, "loss", watched)
    return steps


def recorded(folder):
    return newest_checkpoint(Path(folder))[0].state["draws"]


def test_a_run_of_an_older_version_goes_on_by_its_rule_bit_for_bit(begun, tmp_path, seen):
    folder = halfway(begun, tmp_path / "run", draws=None)
    assert "draws" not in newest_checkpoint(folder)[0].state
    run(folder, "diffusion", **SETTINGS)
    assert len(seen) == 3
    for step, (draws, flips, noise, keys, rules) in enumerate(seen, start=3):
        old = SequentialDraws(0, step, range(8))
        assert type(draws) is SequentialDraws and rules == {1}
        assert torch.equal(flips, old.uniform("flip")) and torch.equal(noise, old.normal("noise", (2, 3)))
        assert torch.equal(keys, old.keys("dropout"))
    assert differences(folder, begun) == [] and read_log(folder) == read_log(begun)
    assert recorded(folder) == 1


def test_a_new_run_records_the_new_rule_and_resumes_by_it(begun, tmp_path, seen):
    whole = run(tmp_path / "whole", "diffusion", **SETTINGS)
    assert recorded(whole) == 2 and differences(whole, begun)
    assert {type(draws) for draws, *_ in seen} == {Draws} and all(rules == {2} for *_, rules in seen)
    folder = halfway(whole, tmp_path / "resumed")
    run(folder, "diffusion", **SETTINGS)
    assert differences(folder, whole) == [] and read_log(folder) == read_log(whole)


def test_a_rule_of_a_later_version_is_refused(begun, tmp_path):
    folder = halfway(begun, tmp_path / "run", draws=3)
    with pytest.raises(ValueError, match="follow rule 3, but this version of cm_diffusers knows only 1 and 2"):
        run(folder, "diffusion", **SETTINGS)
