"""Runs with a budget in minutes: the steps that fit, and the unchanged length of a resumed run."""

import time
from types import SimpleNamespace

import pytest

from cm_diffusers.engine.training import budget
from cm_diffusers.engine.training.budget import Costs
from cm_diffusers.engine.training.trainer import Trainer
from tests.helpers.training_runs import differences, read_log, run


@pytest.mark.parametrize(
    "costs, seconds, every, steps",
    [
        ((0.1, 0, 0, 0), 100, (0, 1000), int(budget.SLACK * 100 / 0.1)),
        ((0.1, 5.0, 2.0, 20.0), 127, (100, 100), int(budget.SLACK * (127 - 27) / (0.1 + 0.05 + 0.02))),
        ((0.1, 5.0, 2.0, 20.0), 127, (0, 100), int(budget.SLACK * (127 - 22) / (0.1 + 0.02))),
        ((0.1, 5.0, 2.0, 20.0), 10, (100, 100), 1),
    ],
)
def test_steps_pictures_checkpoints_and_the_end_fit(costs, seconds, every, steps):
    assert Costs(*costs).steps_in(seconds, *every) == int(steps)


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurement by costs that fit 8 steps into 0.1 minutes; the list has an entry per measurement."""
    calls = []

    def measure(*_):
        calls.append(1)
        return Costs(0.7, 0.0, 0.0, 0.0)

    monkeypatch.setattr(budget, "_measured", measure)
    now = SimpleNamespace(create_time=time.time)
    monkeypatch.setattr(budget, "psutil", SimpleNamespace(Process=lambda: now))
    return calls


def test_the_length_is_kept_and_a_stopped_run_ends_with_the_same_bits(measured, tmp_path, monkeypatch, capsys):
    settings = {"max_train_steps": None, "minutes": 0.1, "checkpointing_steps": 3}
    run(tmp_path / "whole", "ect", **settings)
    assert len(read_log(tmp_path / "whole")) == 8
    assert "Training 8 steps of 700 ms each, for --minutes 0.1." in capsys.readouterr().out

    take = Trainer._take_step

    def broken(trainer, *args):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return take(trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_take_step", broken)
        run(tmp_path / "stopped", "ect", **settings)
    run(tmp_path / "stopped", "ect", **settings)
    assert len(measured) == 2  # once for each folder
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "stopped")


def test_other_minutes_are_another_run(measured, tmp_path):
    run(tmp_path, "ect", max_train_steps=None, minutes=0.1)
    with pytest.raises(ValueError, match="8 steps was set with --minutes 0.1; .* --max_train_steps 8 or more"):
        run(tmp_path, "ect", max_train_steps=None, minutes=0.2)
    run(tmp_path, "ect", max_train_steps=9)
    assert len(read_log(tmp_path)) == 9
    with pytest.raises(ValueError, match="9 steps was set without --minutes"):
        run(tmp_path, "ect", max_train_steps=None, minutes=0.1)


def test_a_length_and_minutes_are_not_given_together(tmp_path):
    with pytest.raises(ValueError, match="max_train_steps 8 has no effect: --minutes 2.0 sets the length"):
        run(tmp_path, "ect", max_train_steps=8, minutes=2.0)


def test_a_measurement_leaves_nothing_in_the_folder_of_the_run(tmp_path):
    run(tmp_path / "run", "ect", max_train_steps=None, minutes=0.001, pretrain_steps=0.3, stage_steps=0.2)
    assert len(read_log(tmp_path / "run")) == 1
    assert not list(tmp_path.glob("run/samples/step-000[1-9]*"))
