"""A run of so many minutes: steps are measured before it, and the length that fits is kept for all resumes."""

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


PLACES = 6  # of a run, in the middles of its sixths: stages differ in what a step costs
SHARE = 0.05  # of the time, that measuring may take
END = 1.2  # times what a process takes to begin: that one which verifies the model begins as this one did
SLACK = 0.97  # of what is left, for what nobody foresees
LEAST = 2  # steps at each place, beside a first one that is not counted


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take: a step, pictures, a checkpoint, and its end."""

    step: float
    pictures: float
    checkpoint: float
    end: float

    def steps_in(self, seconds: float, validation_steps: int, checkpointing_steps: int) -> int:
        """How many steps fit, at least 1, with pictures and checkpoints as often as the run makes them."""
        each = self.step + self.checkpoint / checkpointing_steps
        each += self.pictures / validation_steps if validation_steps else 0
        left = seconds - self.end - self.checkpoint - (self.pictures if validation_steps else 0)
        return max(1, int(SLACK * left / each))


def within_budget(config: Config, accelerator: Accelerator, stopping: Stopping) -> Config:
    """`config` with the length that `minutes` allow, as it is without `minutes`. Checkpoints keep it for resumes.

    Raises:
        ValueError: the run was begun with other minutes, or with a length.
    """
    minutes, folder, steps = config.run.minutes, Path(config.run.output_dir), None
    if minutes is None:
        return config
    with together(accelerator):
        if accelerator.is_main_process and (state := newest_state(folder)) is not None:
            then, steps = state["config"].get("minutes"), state["config"]["max_train_steps"]
            if then != minutes:
                begun = "a length" if then is None else f"{then:g} minutes"
                raise ValueError(
                    f"{folder} holds a run that was begun with {begun}, and has {steps} steps. Give"
                    f" --max_train_steps {steps} or more to go on, or another --output_dir."
                )
    [steps] = broadcast_object_list([steps])
    if steps is None:
        costs = _measured(config, accelerator, stopping, SHARE * 60 * minutes)
        left = 60 * minutes - (time.time() - psutil.Process().create_time())
        steps = costs.steps_in(left, config.run.validation_steps, config.run.checkpointing_steps)
        [steps] = broadcast_object_list([steps])
        if accelerator.is_main_process:
            print(f"For {minutes:g} minutes: {steps} steps, of {1000 * costs.step:.0f} ms each.", flush=True)
    return config.with_settings({"max_train_steps": steps})


def _measured(config: Config, accelerator: Accelerator, stopping: Stopping, seconds: float) -> Costs:
    """What the parts of the run cost, by a trainer that is thrown away."""
    started = time.time() - psutil.Process().create_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "push_to_hub": False, "report_to": None}
        with redirect_stdout(io.StringIO()):  # what the data and the model are is said of the run itself
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
    """Seconds of a step at a place in [0, 1] of the run."""
    trainer.state.step = int(place * trainer.run.max_train_steps)
    trainer.take_step(batches, stopping)
    begin, count = time.perf_counter(), 0
    while count < LEAST or time.perf_counter() - begin < seconds:
        trainer.take_step(batches, stopping)
        count += 1
    return (time.perf_counter() - begin) / count
