"""Runs of a given number of minutes: the number of steps that fit is measured once and kept for all resumes."""

import io
import tempfile
import time
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import psutil
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cm_diffusers.engine.checkpoint import newest_state
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.processes import together
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.build import build_trainer
from cm_diffusers.engine.training.levels import seconds_of_search
from cm_diffusers.engine.training.trainer import Trainer


PLACES = 6  # steps are timed in the middle of each sixth of the run, because the cost of a step differs by stage
SHARE = 0.05  # share of the time for measuring
END = 1.2  # the end takes this many times the start of a process, because another process verifies the model
SLACK = 0.97  # share of the remaining time that is planned; the rest is a reserve
LEAST = 2  # timed steps at each place, after a first step that is not timed


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take.

    Args:
        step: one training step.
        pictures: the sample pictures of one validation.
        checkpoint: one checkpoint.
        end: the export and verification of the model, including the search of noise levels.
    """

    step: float
    pictures: float
    checkpoint: float
    end: float

    def steps_in(self, seconds: float, validation_steps: int, checkpointing_steps: int) -> int:
        """Number of training steps that fit into the time, at least 1.

        Args:
            seconds: the time that is left for the run.
            validation_steps: training steps between two sample pictures; 0 for no pictures.
            checkpointing_steps: training steps between two checkpoints.
        """
        each = self.step + self.checkpoint / checkpointing_steps
        each += self.pictures / validation_steps if validation_steps else 0
        left = seconds - self.end - self.checkpoint - (self.pictures if validation_steps else 0)
        return max(1, int(SLACK * left / each))


def within_budget(config: Config, accelerator: Accelerator, stopping: Stopping) -> Config:
    """Settings with `max_train_steps` set to the number of steps that fit into `minutes`.

    Without `minutes` the settings are returned unchanged. A resumed run takes the number of steps from its checkpoint.

    Args:
        config: the settings of the run.
        accelerator: the processes of the run.
        stopping: the requests to stop, passed to the timed steps.

    Raises:
        ValueError: the run was started with another value of `minutes`, or with a fixed number of steps.
    """
    minutes, folder, steps = config.run.minutes, Path(config.run.output_dir), None
    if minutes is None:
        return config
    with together(accelerator):
        if accelerator.is_main_process and (state := newest_state(folder)) is not None:
            then, steps = state["config"].get("minutes"), state["config"]["max_train_steps"]
            if then != minutes:
                begun = "without --minutes" if then is None else f"with --minutes {then:g}"
                raise ValueError(
                    f"{folder} holds a run whose length of {steps} steps was set {begun}; --minutes {minutes:g} can't"
                    f" change it. Give --max_train_steps {steps} or more to continue it, or another --output_dir."
                )
    [steps] = broadcast_object_list([steps])
    if steps is None:
        costs = _measured(config, accelerator, stopping, SHARE * 60 * minutes)
        left = 60 * minutes - (time.time() - psutil.Process().create_time())
        steps = costs.steps_in(left, config.run.validation_steps, config.run.checkpointing_steps)
        [steps] = broadcast_object_list([steps])
        if accelerator.is_main_process:
            print(f"Training {steps} steps of {1000 * costs.step:.0f} ms each, for --minutes {minutes:g}.", flush=True)
    return config.with_settings({"max_train_steps": steps})


def _measured(config: Config, accelerator: Accelerator, stopping: Stopping, seconds: float) -> Costs:
    """Time the parts of the run with a temporary trainer; its steps take `seconds` in total."""
    started = time.time() - psutil.Process().create_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "push_to_hub": False, "report_to": None}
        with redirect_stdout(io.StringIO()):  # the run itself prints the facts of data and model
            trainer = build_trainer(config.with_settings(settings), accelerator)
        with closing(trainer.data.batches(trainer.share, trainer.run.seed, 0)) as batches:
            times = [_step_at(trainer, batches, stopping, (i + 0.5) / PLACES, seconds / PLACES) for i in range(PLACES)]
        begin = time.perf_counter()
        trainer.save()
        saved = time.perf_counter()
        with together(accelerator):
            if accelerator.is_main_process and trainer.run.validation_steps:
                trainer._draw()
        drawn, search = time.perf_counter(), 0.0
        if accelerator.is_main_process and trainer.run.search_levels:
            search = seconds_of_search(trainer.exported(), trainer.data, trainer.run.search_levels, accelerator.device)
        accelerator.free_memory()
    return Costs(sum(times) / PLACES, drawn - saved, saved - begin, END * started + search)


def _step_at(trainer: Trainer, batches, stopping: Stopping, place: float, seconds: float) -> float:
    """Mean seconds of a training step at the fraction `place` in [0, 1] of the run."""
    trainer.state.step = int(place * trainer.run.max_train_steps)
    trainer.take_step(batches, stopping)
    begin, count = time.perf_counter(), 0
    while count < LEAST or time.perf_counter() - begin < seconds:
        trainer.take_step(batches, stopping)
        count += 1
    return (time.perf_counter() - begin) / count
