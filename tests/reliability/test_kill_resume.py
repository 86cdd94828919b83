"""Killed at any moment, a run that is given the same command again ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import differences, flags, read_log, tensors


REPOSITORY = Path(__file__).parents[2]
KILLS = 10
SETTINGS = {
    "train_batch_size": 16,
    "max_train_steps": 75,
    "pretrain_steps": 30,
    "stage_steps": 15,
    "dropout": 0.1,
    "ema_decay": [0.9],
    "logging_steps": 2,
    "max_train_samples": 200,
}
MODEL = "pipeline/unet/diffusion_pytorch_model.safetensors"


class ForkServer:
    """Starts training runs within milliseconds; see fork_server.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def start(self, folder):
        """Begin a run; gives the process id."""
        self.process.stdin.write(json.dumps(flags(folder, **SETTINGS)) + "\n")
        self.process.stdin.flush()
        return int(self._answer("child"))

    def wait(self):
        """The exit code of the run, negative for a signal."""
        return int(self._answer("ended"))

    def _answer(self, word):
        for line in self.process.stdout:
            if line.startswith(word + " "):
                return line.split()[1]
        raise RuntimeError("the server ended")


@pytest.fixture(scope="module")
def server():
    server = ForkServer()
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The run without a kill."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    server.start(folder)
    assert server.wait() == 0
    return folder


def newest_step(folder):
    return max([int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")], default=0)


def being_saved(folder):
    return any(folder.glob(".tmp-*"))


def has_saved_after(folder, step):
    return newest_step(folder) > step


def is_saving_first_after(folder, step):
    return being_saved(folder) and newest_step(folder) == step


def wait_until(condition, *args):
    end = time.monotonic() + 120
    while not condition(*args):
        assert time.monotonic() < end, "the run does not come forward"
        time.sleep(0.001)


def assert_same(folder, whole):
    groups = {group for group, _ in tensors(whole)}
    assert groups == {"model", "optimizer", "ema_0.9"}
    assert differences(folder, whole) == []
    assert (folder / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert read_log(folder) == read_log(whole)
    assert [row["step"] for row in read_log(folder)] == [*range(2, 75, 2), 75]


def test_ten_kills_change_nothing(server, whole, tmp_path):
    rng = random.Random(0)
    in_a_save, steps = 0, []
    for kill in range(KILLS):
        child = server.start(tmp_path)
        before = newest_step(tmp_path)
        if kill % 3 == 1:
            wait_until(is_saving_first_after, tmp_path, before)
            time.sleep(rng.uniform(0, 0.03))
        elif kill % 3 == 2:
            wait_until(has_saved_after, tmp_path, before)
            time.sleep(rng.uniform(0, 0.15))
        else:
            time.sleep(rng.uniform(0, 1.5))
        os.kill(child, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        in_a_save += being_saved(tmp_path)
        steps.append(newest_step(tmp_path))
    assert in_a_save >= 2 and len(set(steps)) >= 4
    assert not (tmp_path / "pipeline").exists()
    server.start(tmp_path)
    assert server.wait() == 0
    assert_same(tmp_path, whole)
    assert not being_saved(tmp_path)


def test_a_launched_run_is_killed_and_resumed(whole, tmp_path):
    script = str(REPOSITORY / "training" / "train_consistency.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script]
    command = [*launch, *flags(tmp_path, **SETTINGS)]
    settings = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **settings)
    wait_until(has_saved_after, tmp_path, 5)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 6 <= newest_step(tmp_path) < 75
    assert subprocess.run(command, **settings).returncode == 0
    assert_same(tmp_path, whole)
