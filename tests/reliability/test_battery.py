"""A hundred kills and sixty signals at random moments, over all methods: no step is lost, and no process is left.

Each run is interrupted repeatedly and resumed by the same command. In the end it equals an uninterrupted run.
"""

import contextlib
import os
import random
import signal
import sys
import time

import psutil
import pytest

from cm_diffusers.engine.checkpoint import newest_checkpoint
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.method_runs import settings_of
from tests.helpers.scripts import ACCELERATE, SCRIPT, TORCHRUN
from tests.helpers.training_runs import differences, flags, read_log


TRAINED_BY = {"diffusion": "diffusion", "cdm": "diffusion", "ctm": "trajectory"}
TRAINED_BY |= dict.fromkeys(("sct", "scd", "mean_flow"), "continuous")
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
STEPS, KILLS = 30, 10
WAYS = ["one", "one", "two", "two", "accelerate", "torchrun"]  # launches of the runs that get a signal
GONE = 20.0  # seconds


class Launched:
    """A run started by a launcher."""

    def __init__(self, launch, folder, method, settings):
        script = SCRIPT.replace("consistency", TRAINED_BY.get(method, "consistency"))
        command = [*launch[:-1], script, *flags(folder, method, **settings), "--method", method]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        with open(os.devnull, "w") as nothing:
            self.launcher = psutil.Popen(
                command, env=environment, stdout=nothing, stderr=nothing, start_new_session=True
            )

    def processes(self):
        return [self.launcher, *self.launcher.children(recursive=True)]


def steps_saved(folder):
    checkpoint = newest_checkpoint(folder)[0] if folder.exists() else None
    return checkpoint.step if checkpoint else 0


def steps_logged(folder):
    return read_log(folder)[-1]["step"] if (folder / "log.jsonl").exists() and read_log(folder) else 0


def wait_for_a_moment(rng, folder, process, start=3):
    """Sleep until a random moment of the start, which takes `start` seconds, of the training, or of a save."""
    end, kind, before = time.monotonic() + 100, rng.random(), steps_saved(folder)
    if kind < 0.3:
        time.sleep(rng.uniform(0, start))
        return
    while steps_logged(folder) <= before and time.monotonic() < end and process.is_running():
        time.sleep(0.002)
    if kind < 0.6:
        while not any(folder.glob(".tmp-[0-9]*")) and time.monotonic() < end and process.is_running():
            time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.6))


def assert_ends(processes, what):
    _, alive = psutil.wait_procs(processes, GONE)
    for process in alive:
        process.kill()
    assert not alive, f"{what}: {alive}"


def send(number, processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def settings_for(models, method, processes):
    settings = settings_of(
        models, method, "saved" if method in ("ct", "cd", "ctm") else "scratch", adversary=method == "ctm"
    )
    settings |= {"pretrain_steps": 10, "stage_steps": 5} if method == "ect" else {}
    return {
        **settings,
        "max_train_steps": STEPS,
        "checkpointing_steps": 3,
        "train_batch_size": settings["train_batch_size"] // processes,
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", OBJECTIVES)
def test_kills_and_signals_at_random_moments_change_nothing(server, models, tmp_path, method):
    rng, done = random.Random(method), {"kills": 0, "in a save": 0, "signals": 0, "answered": 0}
    wholes = {}
    for processes in (1, 2):
        wholes[processes] = tmp_path / f"whole{processes}"
        server.run(wholes[processes], method, processes, **settings_for(models, method, processes))

    folder, settings = tmp_path / "killed", settings_for(models, method, 1)
    for _ in range(KILLS):
        [child] = map(psutil.Process, server.start(folder, method, **settings))
        wait_for_a_moment(rng, folder, child)
        done["kills"] += child.is_running()
        send(signal.SIGKILL, [child])
        server.wait()
        done["in a save"] += any(folder.glob(".tmp-[0-9]*"))
        if steps_saved(folder) == STEPS:
            break
    end(server, folder, method, 1, settings, wholes)

    for i, way in enumerate(WAYS):
        folder, processes = tmp_path / f"{way}{i}", 2 if way in ("two", "torchrun") else 1
        settings = settings_for(models, method, processes)
        number = SIGNALS[rng.randrange(4)]
        if way in ("one", "two"):
            running = [*map(psutil.Process, server.start(folder, method, processes, **settings))]
            wait_for_a_moment(rng, folder, running[0])
            send(number, running if rng.random() < 0.5 else [rng.choice(running)])
            done["signals"] += 1
            assert_ends(running, f"{method}, {way}, {number.name}")
            server.wait()
        else:
            launched = Launched(TORCHRUN if way == "torchrun" else ACCELERATE, folder, method, settings)
            wait_for_a_moment(rng, folder, launched.launcher, start=12)
            running = launched.processes()
            trainers = launched.launcher.children()[:processes]
            whom = rng.choice([[launched.launcher], running, trainers[:1]])
            send(number, whom)
            done["signals"] += 1
            assert_ends(running, f"{method}, {way}, {number.name} to {len(whom)} of {len(running)}")
        assert steps_logged(folder) == steps_saved(folder), f"{method}, {way}, {number.name}"
        done["answered"] += steps_saved(folder) > 0
        end(server, folder, method, processes, settings, wholes)
    print(f"\n{method}: {done}", file=sys.__stderr__)


def end(server, folder, method, processes, settings, wholes):
    """Train to the end, and compare the run with the uninterrupted one."""
    server.run(folder, method, processes, **settings)
    assert differences(folder, wholes[processes]) == []
    assert read_log(folder) == read_log(wholes[processes])
