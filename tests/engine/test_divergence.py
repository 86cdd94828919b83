"""Runs that diverge: the checkpoints that are kept, and the advice in the message, which works."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import cm_diffusers.engine.training.state as state_module
from cm_diffusers.core.ema import EMA
from cm_diffusers.engine.checkpoint import list_checkpoints, load_checkpoint
from cm_diffusers.engine.config import RunArguments
from cm_diffusers.engine.files import RunFiles
from cm_diffusers.engine.training.divergence import Diverged, advice, breakage, is_sound
from cm_diffusers.objectives.ect import ECT
from tests.helpers.training_runs import flags, read_log, run, tensors


SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train_consistency.py"
SHORT = {"max_train_steps": 30, "checkpointing_steps": 1, "max_skipped_steps": 2}


@pytest.fixture
def explode(monkeypatch):
    """A function that makes weights large after `step` steps and losses nan three steps later; None undoes it."""
    original = ECT.loss

    def set_step(step, factor=100.0, broken=True):
        def loss(self, batch, draws):
            result = original(self, batch, draws)
            if broken and draws.step > step + 2:
                return replace(result, total=result.total * float("nan"))
            if draws.step < step:
                return result
            parameters = list(self.network.parameters())
            if draws.step == step:
                with torch.no_grad():
                    torch._foreach_mul_(parameters, factor)
            total = 1e-9 * sum(parameter.mean() for parameter in parameters)
            return replace(result, total=total, per_sample=result.per_sample.nan_to_num(1.0, 1.0))

        monkeypatch.setattr(ECT, "loss", original if step is None else loss)

    return set_step


def steps_of(folder):
    return [step for step, _ in list_checkpoints(Path(folder))]


def diverge(folder, **settings):
    """The error message of a diverging run."""
    with pytest.raises(Diverged) as error:
        run(folder, **{**SHORT, **settings})
    return str(error.value)


def test_the_newest_sound_checkpoint_outlives_those_after_a_blow_up(tmp_path, explode):
    """A run never resumes from finite but useless weights, however many such checkpoints follow."""
    explode(3)
    message = diverge(tmp_path)
    assert "checkpoint-3 is sound" in message and "The last checkpoint is sound" not in message
    assert steps_of(tmp_path) == [3]
    assert sorted(path.name for path in tmp_path.glob("diverged-*")) == [
        "diverged-checkpoint-7",
        "diverged-checkpoint-8",
    ]


def test_weights_that_are_large_and_give_finite_losses_end_the_run(tmp_path, explode):
    """One wild gradient leaves weights of 1e13. The loss stays finite, and no later step repairs the weights."""
    explode(3, 1e13, broken=False)
    message = diverge(tmp_path)
    assert "has diverged by step 4, which is not saved: its weights have grown to 1.0e+13 times" in message
    assert "checkpoint-3 is sound" in message and steps_of(tmp_path) == [3, 2]


def test_a_weight_that_is_no_number_ends_the_run_before_anything_of_it_is_saved(tmp_path, monkeypatch):
    after_step = ECT.after_step

    def broken(self, step):
        after_step(self, step)
        if step == 3:
            with torch.no_grad():
                next(self.network.parameters()).view(-1)[0] = float("nan")

    monkeypatch.setattr(ECT, "after_step", broken)
    message = diverge(tmp_path / "often", checkpointing_steps=1)
    assert "by step 4, which is not saved: 1 of " in message and "not finite (the first is conv_in.weight)" in message
    message = diverge(tmp_path / "seldom", checkpointing_steps=3)  # the next step's loss reveals it
    assert "diverged by step 5: 1 of " in message and "checkpoint-3 is sound" in message
    for folder in (tmp_path / "often", tmp_path / "seldom"):
        assert steps_of(folder)[0] == 3 and not list(folder.glob("diverged-*"))
        for _, path in list_checkpoints(folder):
            assert all(v.isfinite().all() for group in load_checkpoint(path).tensors.values() for v in group.values())


@pytest.mark.parametrize("group, name", [("ema_halflife_500kimg", "conv_in.bias"), ("optimizer", "0.exp_avg")])
def test_a_state_that_is_no_number_is_not_saved(tmp_path, monkeypatch, group, name):
    update, state = EMA.update, state_module.optimizer_tensors

    def broken_update(self, images_seen, batch_size):
        update(self, images_seen, batch_size)
        if images_seen == 4 * batch_size:
            self.shadows[group][name][0] = float("inf")

    def broken_state(optimizer):
        return state(optimizer) | ({name: torch.tensor(float("nan"))} if steps_of(tmp_path)[:1] == [3] else {})

    if group == "optimizer":
        monkeypatch.setattr(state_module, "optimizer_tensors", broken_state)
    else:
        monkeypatch.setattr(EMA, "update", broken_update)
    message = diverge(tmp_path)
    assert f"by step 4, which is not saved: {name} of {group} is not finite" in message
    assert steps_of(tmp_path) == [3, 2]


def test_a_bad_batch_is_told_apart_from_a_divergence(tmp_path, capsys, monkeypatch):
    loss = ECT.loss

    def bad_batch(self, batch, draws):
        result = loss(self, batch, draws)
        return replace(result, total=result.total * float("nan")) if draws.step == 2 else result

    monkeypatch.setattr(ECT, "loss", bad_batch)
    run(tmp_path, max_train_steps=5)
    said = capsys.readouterr().out
    assert "WARNING: step 3 is skipped" in said and "The weights are unchanged" in said
    assert read_log(tmp_path)[-1]["skipped"] == 1


@pytest.mark.parametrize(
    "changed", [{"learning_rate": 1e-4}, {"max_grad_norm": 1.0}, {"mixed_precision": "bf16"}], ids=str
)
def test_the_settings_that_the_message_names_may_change_on_resuming(tmp_path, capsys, explode, changed):
    explode(3)
    diverge(tmp_path)
    explode(None)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    run(tmp_path, **{**SHORT, "max_train_steps": 6, **changed})
    AcceleratorState._reset_state(reset_partial_state=True)
    (name,) = changed
    said = capsys.readouterr().out
    assert "Resumed from step 3 of 6" in said and re.search(f"{name} was .*, is .* from here on", said)
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all(value.isfinite().all() for value in tensors(tmp_path).values())


def test_other_settings_may_not_change_after_a_divergence(tmp_path, explode):
    explode(3)
    diverge(tmp_path)
    explode(None)
    with pytest.raises(ValueError, match="other settings: seed was 0, is 1"):
        run(tmp_path, **{**SHORT, "seed": 1})


def test_a_run_that_never_diverged_keeps_its_learning_rate(tmp_path):
    run(tmp_path, max_train_steps=1)
    with pytest.raises(ValueError, match="other settings: learning_rate"):
        run(tmp_path, max_train_steps=2, learning_rate=1e-4)


def test_the_same_settings_after_a_divergence_are_said_to_be_those_that_diverged(tmp_path, capsys, explode):
    explode(3)
    diverge(tmp_path)
    capsys.readouterr()
    diverge(tmp_path)
    assert "WARNING: with these settings this run diverged at step 8." in capsys.readouterr().out


def test_without_a_sound_checkpoint_the_run_starts_anew_with_what_the_message_advises(tmp_path, capsys, explode):
    explode(0)
    message = diverge(tmp_path)
    assert "No checkpoint is sound" in message and "starts again from step 0" in message
    assert steps_of(tmp_path) == []
    explode(None)
    run(tmp_path, **{**SHORT, "max_train_steps": 3, "learning_rate": 1e-4})
    assert "Resumed" not in capsys.readouterr().out and steps_of(tmp_path)[0] == 3


@pytest.mark.wide
def test_a_real_blow_up_ends_with_a_message_and_code_2_and_its_advice_trains_to_the_end(tmp_path):
    """A command with a learning rate that breaks the network, and then one that follows the message's advice."""
    settings = {**SHORT, "learning_rate": 1000.0, "max_skipped_steps": 4}
    command = [sys.executable, str(SCRIPT), *flags(tmp_path / "r", **settings)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 2 and "Traceback" not in first.stderr
    message = first.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert "a lower --learning_rate (it is 1000)" in message and (tmp_path / "r" / RunFiles.DIVERGED).is_file()
    second = subprocess.run([*command, "--learning_rate", "1e-4"], capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert read_log(tmp_path / "r")[-1]["skipped"] == 0


# --- messages, and sound states ------------------------------------------------------------------------------------


def test_where_no_step_was_finite_the_pace_is_not_blamed(tmp_path, monkeypatch):
    original = ECT.loss
    broken = lambda self, batch, draws: replace(r := original(self, batch, draws), total=r.total * float("nan"))  # noqa: E731
    monkeypatch.setattr(ECT, "loss", broken)
    message = diverge(tmp_path)
    assert "learning_rate" not in message and "max_grad_norm" not in message
    assert "Check the images, and the model that the run starts from" in message


@pytest.mark.parametrize(
    "run_settings, precision, named, not_named",
    [
        ({}, "no", ["--learning_rate (it is 0.0001)", "--max_grad_norm 1:"], ["--mixed_precision"]),
        ({"max_grad_norm": 2.0}, "no", ["a lower --max_grad_norm (it is 2)"], ["--max_grad_norm 1"]),
        ({}, "fp16", ["--mixed_precision no (it is fp16)"], []),
    ],
)
def test_the_advice_is_of_settings_that_are_not_so_yet(run_settings, precision, named, not_named):
    text = advice(RunArguments(**run_settings), precision, 5, True)
    assert all(words in text for words in named) and not any(words in text for words in not_named)


@pytest.mark.parametrize(
    "weights, average, skipped, sound",
    [
        (1.0, 1.0, 0, True),
        (3.0, 1.0, 0, True),
        (1.0, 1.0, 1, False),
        (float("nan"), 1.0, 0, False),
        (1.0, float("inf"), 0, False),
        (30.0, 1.0, 0, False),  # blown up just now
        (300.0, 299.0, 0, False),  # blown up, and the average has followed
    ],
)
def test_what_a_sound_state_is(weights, average, skipped, sound):
    state = {"model": {"w": torch.full((4,), weights)}, "ema": {"w": torch.full((4,), average)}}
    assert is_sound(state, "ema", 2.0, skipped) is sound


@pytest.mark.parametrize(
    "value, words",
    [(1.0, ""), (900.0, ""), (1e13, "grown to 1.0e+13 times"), (1e25, "grown to 1.0e+25"), (float("inf"), "is w")],
)
def test_what_weights_are_that_no_training_repairs(value, words):
    fault = breakage({"n": torch.tensor(7), "v": torch.zeros(3), "w": torch.full((4,), value)}, 2.0)
    assert words in fault and bool(fault) == bool(words)


def test_a_checkpoint_says_whether_it_is_sound(tmp_path, explode):
    run(tmp_path / "good", max_train_steps=2)
    assert load_checkpoint(tmp_path / "good" / "checkpoint-2").state["sound"] is True
    explode(0)
    run(tmp_path / "bad", max_train_steps=2, checkpointing_steps=1)
    assert load_checkpoint(tmp_path / "bad" / "checkpoint-2").state["sound"] is False
