"""The training loop of a new or resumed run: steps, log, checkpoints and pictures."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.engine.checkpoint import (
    DamagedCheckpoint,
    NotFinite,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_aside_newer,
)
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.data.streams import StreamFault
from cm_diffusers.engine.files import RunFiles, naming
from cm_diffusers.engine.log import cut_log
from cm_diffusers.engine.pictures.curves import plot_losses
from cm_diffusers.engine.processes import together
from cm_diffusers.engine.sharing.card import RunSummary
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.divergence import Diverged, advice, breakage, go_back, is_sound, read_note
from cm_diffusers.engine.training.product import Product
from cm_diffusers.engine.training.same_run import check_same_run
from cm_diffusers.engine.training.skipping import Skipped
from cm_diffusers.engine.training.state import RunState, average_profiles, exported_weights
from cm_diffusers.engine.training.step import StepResult, TrainingStep
from cm_diffusers.engine.training.tracking import log_pictures
from cm_diffusers.objectives import Objective


LOOK_STEPS = 20  # at most so many steps are taken between two looks at the skipped ones


class Trainer:
    """Trains one objective on one dataset, from the start or from a checkpoint.

    Args:
        config: the settings.
        objective: the training method, which holds the network.
        data: the dataset, of images or latents.
        accelerator: the processes and devices of the run.
        kind: makes the product of the run from its settings, method, data and device.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        data: ImageData,
        accelerator: Accelerator,
        kind: Callable[..., Product] = Product,
    ):
        config = config.resolved()
        run = config.run
        self.config, self.run, self.objective, self.data, self.accelerator = config, run, objective, data, accelerator
        self.folder = Path(run.output_dir)
        self.log_file = self.folder / RunFiles.LOG
        self.share = ProcessShare(
            run.train_batch_size, run.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
        )
        self.state = RunState(objective, run, accelerator)
        self.take_step = TrainingStep(config, data, self.state, self.share, accelerator)
        self.on_save: Callable[[], None] = lambda: None  # called on the main process after each sound checkpoint
        self.skipped = Skipped()  # as it was at the last look
        self.product = kind(config, objective, data, accelerator.device)

    @property
    def step(self) -> int:
        """The number of training steps taken so far."""
        return self.state.step

    def say(self, text: str) -> None:
        """Print the line `text` on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def summary(self) -> RunSummary:
        """The facts for the model card that are not settings."""
        channels, (height, width), classes = self.data.channels, self.data.resolution, self.data.num_classes
        shape = f"{channels} x {height} x {width}" + (" latents" if self.data.vae else "")
        shape += f", {classes} classes" if classes else ""
        processes = self.accelerator.num_processes
        return RunSummary(self.step, self.share.global_batch, processes, shape, self.data.description)

    def exported(self) -> DiffusionPipeline:
        """The pipeline with the present weights, as it would be saved."""
        return self.product.pipeline(exported_weights(self.state.tensors(), self.run))

    # --- the loop ----------------------------------------------------------------------------------------------

    def fit(self, stopping: Stopping) -> None:
        """Train up to the last step.

        Args:
            stopping: requests to stop, which are looked at after each step.

        Raises:
            Stopped: a process was asked to stop; a checkpoint is saved.
            Diverged: the run has diverged and can't continue from its present state.
            ValueError: a stream of images has failed; a checkpoint is saved if any step was trained.
        """
        with stopping.held(), closing(self.data.batches(self.share, self.run.seed, self.step)) as batches:
            self._fit(batches, stopping)

    def _fit(self, batches: Iterator[dict[str, Any]], stopping: Stopping) -> None:
        run, main = self.run, self.accelerator.is_main_process
        bar = tqdm(total=run.max_train_steps, initial=self.step, desc=self.config.method, disable=not main)
        clock, clock_step = time.perf_counter(), self.step
        try:
            while self.step < run.max_train_steps:
                result = self._take_step(batches, stopping)
                bar.update()
                last = self.step == run.max_train_steps
                logged = last or self.step % run.logging_steps == 0
                saved = last or result.stop or self.step % run.checkpointing_steps == 0
                if logged or self.step % LOOK_STEPS == 0:  # `save` looks by itself
                    self._look_at_skipped()
                if logged:
                    now = time.perf_counter()
                    row = self._log(result.norm, (now - clock) / max(1, self.step - clock_step))
                    clock, clock_step = now, self.step
                    bar.set_postfix(loss=row["loss"], skipped=row["skipped"], **self.objective.describe(self.step - 1))
                if saved:
                    sound = self.save()
                    with together(self.accelerator):
                        if main and not last and sound:  # the export follows the last step
                            self.on_save()
                if result.stop:
                    then, where = "exports the model" if last else "continues", f"{self.step} of {run.max_train_steps}"
                    raise stopping.stopped(f"at step {where}, which is saved. The same command {then}.")
                if run.validation_steps and (last or self.step % run.validation_steps == 0):
                    with together(self.accelerator):
                        if main:
                            self._draw()
        finally:
            bar.close()

    def _take_step(self, batches: Iterator[dict[str, Any]], stopping: Stopping) -> StepResult:
        try:
            result = self.take_step(batches, stopping)
        except StreamFault as fault:
            if not self.step:
                raise ValueError(f"{fault} Nothing is trained yet. Repair the dataset, and start again.") from None
            self.save()
            raise ValueError(
                f"{fault} The run is saved at step {self.step}. Repair the dataset; the same command resumes the run."
            ) from None
        return result

    def _log(self, norm: Tensor, seconds_per_step: float) -> dict[str, Any]:
        """Append a line to the log for the steps since its last line."""
        state = self.state
        state.gather_meter()
        row = {"step": state.step, **state.meter.read(), "grad_norm": norm.item()}
        row |= {"lr": self.take_step.learning_rate(state.step - 1), "skipped": self.skipped.count}
        row |= self.objective.describe(state.step - 1)
        row["time"] = {"images_per_second": round(self.share.global_batch / seconds_per_step, 1)}
        state.meter = state.new_meter()
        with together(self.accelerator), naming(self.log_file):
            if self.accelerator.is_main_process:
                with open(self.log_file, "a") as file:
                    file.write(json.dumps(row) + "\n")
        if self.run.trackers:
            flat = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            flat |= {f"loss/sigma_{k}": v for k, v in row["loss_by_sigma"].items()}
            self.accelerator.log(flat, step=state.step)
        return row

    def _draw(self) -> None:
        """Draw the pictures of the model as it would be exported now, and the loss curves."""
        name = self.folder / RunFiles.PICTURES / f"step-{self.step:07d}.png"
        pictures, numbers = self.product.draw(self.exported(), name)
        if numbers:
            self.say(f"Step {self.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items()))
        if self.log_file.exists():
            plot_losses(self.log_file, self.folder / RunFiles.CURVES)
        log_pictures(self.accelerator, pictures, self.step)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Save a checkpoint of the present step.

        Returns:
            On the main process, whether the checkpoint is sound: a run that diverges later can continue from it. On
            the other processes False.

        Raises:
            Diverged: the weights are broken and nothing was saved. It is raised on all processes.
        """
        self._look_at_skipped()
        state = self.state
        state.gather_meter()
        fault, sound = "", False
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                tensors, average = state.tensors(), average_profiles(self.run)[0].name
                fault = breakage(tensors["model"], state.start_norm)
                sound = is_sound(tensors, average, state.start_norm, self.skipped.in_a_row)
                values = {
                    "config": self.config.given.to_dict(),
                    "data": self.data.description.to_dict(),
                    "global_batch": self.share.global_batch,
                    **state.values(self.skipped),
                    "sound": sound,
                }
                try:
                    if not fault:
                        save_checkpoint(self.folder, state.step, tensors, values, self.run.checkpoints_total_limit)
                except NotFinite as error:
                    fault = str(error)
        [fault] = broadcast_object_list([fault])
        if fault:
            self._diverge(f"The run has diverged by step {state.step}, which is not saved: {fault}", state.step)
        return sound

    def resume(self) -> bool:
        """Load the newest checkpoint that verifies, and print its step. False for a new run.

        Raises:
            DamagedCheckpoint: there are checkpoints, but none verifies.
            ValueError: the settings or data are not those of the checkpoint, or it is beyond the last step.
        """
        checkpoint, step, error = None, None, None
        diverged = read_note(self.folder)
        if diverged and all(getattr(self.run, key) == value for key, value in diverged["settings"].items()):
            self.say(f"WARNING: with these settings this run diverged at step {diverged['step']}.")
        if self.accelerator.is_main_process:
            try:
                checkpoint, faults = newest_checkpoint(self.folder)
                step = checkpoint and checkpoint.step
                for fault in faults:
                    self.say(f"WARNING: a damaged checkpoint is ignored: {fault}")
            except DamagedCheckpoint as damage:
                error = str(damage)
        step, error = broadcast_object_list([step, error])
        if error:
            raise DamagedCheckpoint(error)
        if step is None:
            self._cut_log()
            return False
        checkpoint = checkpoint or load_checkpoint(self.folder / f"checkpoint-{step}")
        data, global_batch = self.data.description, self.share.global_batch
        for line in check_same_run(self.config, self.folder, checkpoint.state, data, global_batch):
            self.say(line)
        if checkpoint.step > self.run.max_train_steps:
            raise ValueError(
                f"{self.folder} holds a run at step {checkpoint.step}, but max_train_steps is"
                f" {self.run.max_train_steps}. Give {checkpoint.step} or more to continue, or another --output_dir."
            )
        self.state.load(checkpoint)
        self.skipped = self.state.skips.look()
        if self.accelerator.is_main_process:
            set_aside_newer(self.folder, self.step)
        self._cut_log()
        self.say(f"Resumed from step {self.step} of {self.run.max_train_steps}.")
        return True

    def _cut_log(self) -> None:
        if self.accelerator.is_main_process:
            for line in cut_log(self.log_file, self.step, expected=self.step >= self.run.logging_steps):
                self.say(line)

    # --- divergence --------------------------------------------------------------------------------------------

    def _look_at_skipped(self) -> None:
        """Warn about skipped steps. End the run if the weights are broken or too many steps are skipped."""
        before, self.skipped = self.skipped, self.state.skips.look()
        new, step = self.skipped.count - before.count, self.skipped.last - 1
        if not new:
            return
        fault = breakage(self.state.weights(), self.state.start_norm)
        if fault:
            self._diverge(f"The run has diverged by step {step + 1}: {fault}", step)
        if self.skipped.longest > self.run.max_skipped_steps:
            self._diverge(
                f"{self.skipped.longest} steps in a row, up to step {step + 1}, had a loss or gradient that is not"
                " finite, although the weights are finite",
                step,
            )
        if self.skipped.longest and not before.in_a_row:
            which = f"step {step + 1} is" if new == 1 else f"{new} steps up to step {step + 1} are"
            self.say(
                f"WARNING: {which} skipped, because the loss or gradient is not finite. The weights are unchanged."
                " Check the images if this happens often."
            )

    def _diverge(self, why: str, step: int) -> NoReturn:
        """End the run in a state from which it can continue at its newest sound checkpoint."""
        sound = [go_back(self.folder, step, self.run) if self.accelerator.is_main_process else None]
        (sound,) = broadcast_object_list(sound)
        moved = self.skipped.count <= step
        raise Diverged(f"{why}. The run ends. " + advice(self.run, self.accelerator.mixed_precision, sound, moved))
