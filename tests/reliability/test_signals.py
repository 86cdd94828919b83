"""Signals, a second Ctrl-C and lost launchers: the run saves its progress and leaves no process."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import datasets
import numpy as np
import psutil
import pytest
from PIL import Image

from cm_diffusers.engine.checkpoint import newest_checkpoint
from cm_diffusers.engine.stopping import Stopped, Stopping
from tests.helpers.breadth import narrowed
from tests.helpers.scripts import ACCELERATE, PYTHON, SCRIPT, TORCHRUN
from tests.helpers.training_runs import differences, flags, read_log, run


LONG = {"max_train_steps": 3000, "checkpointing_steps": 100_000, "pretrain_steps": 2, "stage_steps": 1000}
ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def name_of(number):
    return number.name


@pytest.fixture(autouse=True)
def hang_ups_are_heard():
    """Undo nohup: if the tests run under it, the processes they start would inherit that hang-ups are ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class Started:
    """A training run in other processes: `launcher`, `trainers`, and `rest`, which are all of them."""

    def __init__(self, launch, folder, **settings):
        self.folder, self.workers = folder, 2 if launch is TORCHRUN else 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        self.output = folder.with_name(f"{folder.name}.txt")
        with open(self.output, "w") as output:
            self.launcher = psutil.Popen(
                [*launch, *flags(folder, **{**LONG, **settings})],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.launch, self.trainers, self.rest = launch, [], []

    def until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.launcher.poll() is None, self.text()
            time.sleep(0.01)
        self.rest = [self.launcher, *self.launcher.children(recursive=True)]
        self.trainers = [self.launcher] if self.launch is PYTHON else self.launcher.children()[: self.workers]
        return self

    def until_it_trains(self):
        return self.until(lambda: (self.folder / "log.jsonl").exists())

    def send(self, number, processes):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def ends(self, seconds=20):
        """Whether all processes end within `seconds`; any others are killed."""
        _, alive = psutil.wait_procs(self.rest, seconds)
        for process in alive:
            process.kill()
        return not alive

    def text(self):
        return self.output.read_text()


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(launch, **settings):
        runs.append(Started(launch, tmp_path / f"run{len(runs)}", **settings))
        return runs[-1]

    yield begin
    for one in runs:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*one.launcher.children(recursive=True), one.launcher]:
                process.kill()


def assert_goes_on_exactly(folder, capsys):
    """Assert that the same command, with two more steps, gives the result of an uninterrupted run."""
    step = newest_checkpoint(folder)[0].step
    assert 1 <= step < 3000 and read_log(folder)[-1]["step"] == step
    settings = {**LONG, "max_train_steps": step + 2}
    run(folder, **settings)
    assert f"Resumed from step {step}" in capsys.readouterr().out
    run(folder.with_name("whole"), **settings)
    assert differences(folder, folder.with_name("whole")) == []
    assert read_log(folder) == read_log(folder.with_name("whole"))


@pytest.mark.parametrize("number", narrowed(ALL, signal.SIGTERM), ids=name_of)
def test_each_signal_saves_and_stops(start, capsys, number):
    one = start(PYTHON).until_it_trains()
    one.send(number, one.trainers)
    assert one.launcher.wait(20) == 128 + number and one.ends()
    said = f"Stopped by {number.name} at step {newest_checkpoint(one.folder)[0].step} of 3000, which is saved"
    assert said in one.text() and "Traceback" not in one.text()
    if number == signal.SIGUSR1:
        assert_goes_on_exactly(one.folder, capsys)


@pytest.mark.wide
def test_under_nohup_a_closed_terminal_stops_nothing(start):
    one = start(["nohup", *PYTHON]).until_it_trains()
    one.send(signal.SIGHUP, [one.launcher])
    step = read_log(one.folder)[-1]["step"]
    one.until(lambda: read_log(one.folder)[-1]["step"] > step + 3)
    one.send(signal.SIGTERM, [one.launcher])
    assert one.launcher.wait(20) == 128 + signal.SIGTERM and "Stopped by SIGTERM" in one.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=name_of)
@pytest.mark.wide
def test_a_run_whose_launcher_is_gone_saves_and_stops(start, capsys, number):
    """accelerate launch of one process passes no signal on."""
    one = start(ACCELERATE).until_it_trains()
    one.send(number, [one.launcher])
    assert one.ends()
    assert "Stopped by the end of the program that started it" in one.text()
    assert_goes_on_exactly(one.folder, capsys)


@pytest.mark.wide
def test_a_shell_may_end_before_the_run_that_it_started(start, tmp_path):
    command, said = " ".join(map(str, [*PYTHON, *flags(tmp_path / "run0", **LONG)])), tmp_path / "said.txt"
    words = f"{command} > {said} 2>&1 & echo $!; sleep 100; true"
    shell = psutil.Popen(["bash", "-c", words], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(shell.stdout.readline()))
    while not (tmp_path / "run0" / "log.jsonl").exists():
        time.sleep(0.01)
    for process in shell.children():
        if process != child:
            process.kill()
    shell.kill()
    shell.wait()
    time.sleep(3)
    child.send_signal(signal.SIGTERM)
    psutil.wait_procs([child], 20)
    assert not child.is_running() and "Stopped by SIGTERM at step" in said.read_text()


@pytest.mark.parametrize(
    "number", [ALL[0], *(pytest.param(number, marks=pytest.mark.slow) for number in ALL[1:])], ids=name_of
)
@pytest.mark.wide
def test_a_signal_to_every_process_of_two_saves(start, number):
    """As from SLURM: the launcher gets the signal as well and passes it on, so that it arrives twice."""
    one = start(TORCHRUN, train_batch_size=4).until_it_trains()
    one.send(number, [one.launcher, *one.trainers])
    assert one.ends()
    assert "at step" in one.text().split("Stopped by ")[1]
    assert read_log(one.folder)[-1]["step"] == newest_checkpoint(one.folder)[0].step


@pytest.mark.slow
@pytest.mark.parametrize("which", narrowed([0, 1], 1))
def test_a_signal_to_one_process_of_two_saves(start, which):
    one = start(TORCHRUN, train_batch_size=4).until_it_trains()
    one.send(signal.SIGUSR1, one.trainers[which : which + 1])
    assert one.ends()
    assert read_log(one.folder)[-1]["step"] == newest_checkpoint(one.folder)[0].step


@pytest.mark.wide
def test_two_processes_whose_launcher_is_killed_save(start):
    one = start(TORCHRUN, train_batch_size=4).until_it_trains()
    one.send(signal.SIGKILL, [one.launcher])
    assert one.ends()
    assert read_log(one.folder)[-1]["step"] == newest_checkpoint(one.folder)[0].step


@pytest.mark.wide
def test_a_second_interrupt_leaves_at_once_by_one_line(start):
    """The third step never ends, as if another process were gone."""
    program = """
import runpy, sys, time
from cm_diffusers.objectives import ECT
sys.argv, loss = sys.argv[1:], ECT.loss
def stuck(self, batch, draws):
    if draws.step == 2:
        time.sleep(1000)
    return loss(self, batch, draws)
ECT.loss = stuck
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    one = start([sys.executable, "-c", program, SCRIPT])
    one.until(lambda: len(read_log(one.folder)) == 2 if (one.folder / "log.jsonl").exists() else False)
    time.sleep(0.2)
    one.send(signal.SIGINT, [one.launcher])
    time.sleep(0.5)
    assert one.launcher.poll() is None  # the first interrupt waits for the end of the step
    one.send(signal.SIGINT, [one.launcher])
    assert one.launcher.wait(5) == 130
    last = one.text().splitlines()[-1]
    assert last.startswith("The program ended at once, because of a second Ctrl-C. The same command resumes at")
    assert "Traceback" not in one.text()


@pytest.mark.wide
def test_workers_that_load_images_end_with_the_run(start, tmp_path):
    settings = {"dataloader_num_workers": 2, "streaming": True, "dataset_name": write_images(tmp_path / "images")}
    settings |= {"class_conditional": None, "max_train_samples": None}
    one = start(PYTHON, **settings).until_it_trains()
    assert len(one.rest) >= 3
    one.send(signal.SIGTERM, one.rest)  # to the workers as well
    assert one.launcher.wait(20) == 128 + signal.SIGTERM and one.ends(), one.text()
    assert newest_checkpoint(one.folder)[0].step == read_log(one.folder)[-1]["step"]
    two = start(PYTHON, **settings).until_it_trains()
    two.send(signal.SIGKILL, [two.launcher])
    assert two.ends()


def write_images(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)) for _ in range(40)]
    datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()})).to_parquet(
        folder / "train.parquet"
    )
    return folder


def slowed(where, name):
    """A program that runs the script and pauses before `where.name`, after making a file ending in ".reached"."""
    return f"""
import pathlib, runpy, sys, time
import {where} as module
sys.argv, old = sys.argv[1:], module.{name}
def slow(*args, **kwargs):
    pathlib.Path(sys.argv[-1] + ".reached").touch()
    time.sleep(30)
    return old(*args, **kwargs)
module.{name} = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "number", [ALL[1], *(pytest.param(number, marks=pytest.mark.slow) for number in (ALL[0], *ALL[2:]))], ids=name_of
)
@pytest.mark.parametrize(
    "where, name, said, settings",
    [
        ("cm_diffusers.engine.data.images", "save_scan", "before training began. Nothing is lost", {}),
        pytest.param(
            "cm_diffusers.engine.training.product",
            "draw_grids",
            "during the export of the model; the same command exports it",
            {"max_train_steps": 3},
            marks=pytest.mark.wide,
        ),
        pytest.param(
            "cm_diffusers.engine.saved.export",
            "verify_export",
            "during the export of the model",
            {"max_train_steps": 3},
            marks=pytest.mark.wide,
        ),
    ],
)
def test_where_nothing_is_to_be_saved_a_signal_ends_the_run_at_once(start, number, where, name, said, settings):
    one = start([sys.executable, "-c", slowed(where, name), SCRIPT], **settings)
    one.until(lambda: one.folder.with_name(one.folder.name + ".reached").exists())
    one.send(number, [one.launcher])
    assert one.launcher.wait(5) == 128 + number and one.ends()
    assert f"Stopped by {number.name} {said}" in one.text() and "Traceback" not in one.text()
    made = {path.name for path in one.folder.iterdir()}
    assert not any(name.startswith(".tmp") for name in made) and "pipeline" not in made and "exported.json" not in made
    settings = {**LONG, "max_train_steps": 3}
    run(one.folder, **settings)
    assert (one.folder / "pipeline" / "model_index.json").exists()


@pytest.mark.wide
def test_a_process_that_waits_for_another_one_does_not_outlive_a_signal(start):
    """While the main process reads the images, the other one waits in a call that does not return."""
    program = slowed("cm_diffusers.engine.data.images", "save_scan")
    one = start([*TORCHRUN[:-1], "--no-python", sys.executable, "-c", program, SCRIPT], train_batch_size=4)
    one.until(lambda: one.folder.with_name(one.folder.name + ".reached").exists())
    one.trainers = one.launcher.children()
    one.send(signal.SIGTERM, one.trainers)
    assert one.ends() and "before training began" in one.text()


def test_a_forked_process_neither_keeps_the_run_nor_speaks_for_it():
    with Stopping() as stopping:
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
        os.kill(child, signal.SIGUSR1)
        time.sleep(0.1)
        start = time.monotonic()
    assert time.monotonic() - start < 5 and not stopping.requested
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_outside_of_the_main_thread_nothing_is_caught():
    before = [signal.getsignal(number) for number in ALL]

    def look():
        with Stopping() as stopping, stopping.held():
            seen.append([signal.getsignal(number) for number in ALL])

    seen = []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in ALL]
    with Stopping() as stopping:
        assert all(signal.getsignal(number) == stopping._on_signal for number in ALL)
    assert [signal.getsignal(number) for number in ALL] == before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("held", [False, True])
def test_a_request_raises_at_once_or_after_the_block(held):
    with Stopping() as stopping, pytest.raises(Stopped) as caught:
        stopping.remark = "here."
        with stopping.held() if held else contextlib.nullcontext():
            signal.raise_signal(signal.SIGUSR1)
            assert held and stopping.requested == signal.SIGUSR1
            signal.raise_signal(signal.SIGTERM)  # a repeated signal
    assert caught.value.code == 128 + signal.SIGUSR1 and caught.value.message == "Stopped by SIGUSR1 here."


@pytest.mark.wide
def test_a_closed_terminal_does_not_keep_the_run_from_saving(tmp_path):
    """The reader of the run's output has gone, like `tee` after a lost connection."""
    command = [*PYTHON, *flags(tmp_path / "run", **LONG)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None
        os.read(process.stdout.fileno(), 4096)
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) in (128 + signal.SIGHUP, 120)  # 120: the interpreter could not flush its output
    assert newest_checkpoint(tmp_path / "run")[0].step == read_log(tmp_path / "run")[-1]["step"]
