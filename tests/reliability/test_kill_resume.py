"""A run that is killed at any moment and resumed by the same command ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.training_runs import differences, flags, read_log, tensors


REPOSITORY = Path(__file__).parents[2]
KILLS = 10
SETTINGS = {
    "train_batch_size": 16,
    "dropout": 0.1,
    "ema_decay": [0.9],
    "logging_steps": 2,
    "max_train_samples": 200,
}
ECT = {**SETTINGS, "max_train_steps": 75, "pretrain_steps": 30, "stage_steps": 15}
# methods with a target average in their state
AVERAGING = {"ct": {"max_train_steps": 20, "s1": 12}, "cd": {"max_train_steps": 20, "num_scales": 12}}
MODEL = "pipeline/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    server.run(folder, **ECT)
    return folder


def newest_step(folder):
    return max([int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")], default=0)


def being_saved(folder):
    return any(folder.glob(".tmp-[0-9]*"))


def has_saved_after(folder, step):
    return newest_step(folder) > step


def is_saving_first_after(folder, step):
    return being_saved(folder) and newest_step(folder) == step


def wait_until(condition, *args):
    end = time.monotonic() + 120
    while not condition(*args):
        assert time.monotonic() < end, "the run does not come forward"
        time.sleep(0.001)


def kill(server, child):
    os.kill(child, signal.SIGKILL)
    assert server.wait() == [-signal.SIGKILL]


def assert_same(folder, whole, steps=75, auxiliary=()):
    groups = {group for group, _ in tensors(whole)}
    assert groups == {"model", "optimizer", "ema_0.9", *auxiliary}
    assert differences(folder, whole) == []
    assert (folder / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert read_log(folder) == read_log(whole)
    assert [row["step"] for row in read_log(folder)] == [*range(2, steps, 2), steps]


@pytest.mark.wide
def test_ten_kills_change_nothing(server, whole, tmp_path):
    rng = random.Random(0)
    in_a_save, steps = 0, []
    for i in range(KILLS):
        [child] = server.start(tmp_path, **ECT)
        before = newest_step(tmp_path)
        if i % 3 == 1:
            wait_until(is_saving_first_after, tmp_path, before)
            time.sleep(rng.uniform(0, 0.03))
        elif i % 3 == 2:
            wait_until(has_saved_after, tmp_path, before)
            time.sleep(rng.uniform(0, 0.15))
        else:
            time.sleep(rng.uniform(0, 1.5))
        kill(server, child)
        in_a_save += being_saved(tmp_path)
        steps.append(newest_step(tmp_path))
    assert in_a_save >= 2 and len(set(steps)) >= 4
    assert not (tmp_path / "pipeline").exists()
    server.run(tmp_path, **ECT)
    assert_same(tmp_path, whole)
    assert not being_saved(tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("method", AVERAGING)
def test_kills_leave_the_target_average_as_it_is(server, teacher, tmp_path, method):
    settings = {**SETTINGS, **AVERAGING[method]}
    if method == "cd":
        settings["pretrained_teacher_model"] = teacher
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    server.run(whole, method, **settings)
    steps = [0]
    for moment in (has_saved_after, is_saving_first_after, has_saved_after):
        [child] = server.start(folder, method, **settings)
        wait_until(moment, folder, steps[-1])
        kill(server, child)
        steps.append(newest_step(folder))
    assert 0 < steps[1] <= steps[2] < steps[3] < 20
    assert f"Resumed from step {steps[-1]} of 20" in server.run(folder, method, **settings)
    assert_same(folder, whole, 20, ["auxiliary.target"])


@pytest.mark.wide
def test_a_launched_run_is_killed_and_resumed(whole, tmp_path):
    script = str(REPOSITORY / "training" / "train_consistency.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script]
    command = [*launch, *flags(tmp_path, **ECT)]
    settings = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **settings)
    wait_until(has_saved_after, tmp_path, 5)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 6 <= newest_step(tmp_path) < 75
    assert subprocess.run(command, **settings).returncode == 0
    assert_same(tmp_path, whole)
