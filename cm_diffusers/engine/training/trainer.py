"""The training loop: the only place that drives an objective, with Accelerate."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.ema import EMA, ConstantDecay, HalfLife
from cm_diffusers.core.labelled_augmentation import augment
from cm_diffusers.engine.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    NotFinite,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_aside_newer,
)
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.data.streams import StreamFault
from cm_diffusers.engine.files import free_name, holds, naming, replace_file
from cm_diffusers.engine.log import Log, read_log
from cm_diffusers.engine.pictures.curves import plot_losses
from cm_diffusers.engine.pictures.diagnostics import save_diagnostics
from cm_diffusers.engine.pictures.preview import save_preview, with_vae
from cm_diffusers.engine.processes import together
from cm_diffusers.engine.saved.stock import null_class, nulls_of
from cm_diffusers.engine.sharing.card import RunSummary
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.divergence import (
    ADVISED,
    Diverged,
    advice,
    breakage,
    go_back,
    is_sound,
    norm,
    read_note,
)
from cm_diffusers.engine.training.meter import LossMeter
from cm_diffusers.engine.training.optimisers import (
    LearningRate,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from cm_diffusers.engine.training.precision import CastPass
from cm_diffusers.engine.training.same_run import changed_settings, check_global_batch, check_settings
from cm_diffusers.objectives import Batch, Objective


class Trainer:
    """Runs one objective on one dataset to the end, or from where it stopped.

    Args:
        config: the settings.
        objective: the method, holding the network.
        data: the images.
        accelerator: Accelerate's view of the machine.
    """

    def __init__(self, config: Config, objective: Objective, data: ImageData, accelerator: Accelerator):
        config = config.resolved()
        run = config.run
        self.config, self.run, self.objective, self.data, self.accelerator = config, run, objective, data, accelerator
        self.folder = Path(run.output_dir)
        self.log_file = self.folder / "log.jsonl"
        self.spot = ProcessShare(
            run.train_batch_size, run.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
        )
        network = objective.network.to(accelerator.device)
        teacher = [objective.teacher.network] if objective.teacher is not None else []
        for module in (*objective.auxiliary.values(), *teacher):
            accelerator.prepare_model(module, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(network, run))
        objective.model = accelerator.prepare_model(CastPass(torch.compile(network) if run.compile else network))
        objective.model.train()
        if accelerator.num_processes > 1:
            objective.average = lambda value: accelerator.reduce(value, "mean")
        self.adversary = objective.adversary
        if self.adversary is not None:
            discriminator = self.adversary.network.to(accelerator.device)
            self.adversary_optimizer = accelerator.prepare_optimizer(self.adversary.optimizer())
            self.adversary.model = accelerator.prepare_model(discriminator)
        self.learning_rate = LearningRate(run)
        profiles = [HalfLife(kimg, run.ema_rampup) for kimg in run.ema_half_life or []]
        profiles += [ConstantDecay(decay) for decay in run.ema_decay or []]
        self.ema = EMA(network, profiles)
        self._start_norm = norm(network.state_dict().values())
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.meter = LossMeter(self.objective.terms)
        self._shown: dict[str, Any] | None = None  # images for the diagnostics, read once
        self.on_save: Callable[[], None] = lambda: None  # called on the main process after each checkpoint

    def summary(self) -> RunSummary:
        """What a model card says of the run beside its settings."""
        channels, (height, width), classes = self.data.channels, self.data.resolution, self.data.num_classes
        shape = f"{channels} x {height} x {width}" + (" latents" if self.data.vae else "")
        shape += f", {classes} classes" if classes else ""
        processes = self.accelerator.num_processes
        return RunSummary(self.step, self.spot.global_batch, processes, shape, self.data.description)

    # --- state -------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        auxiliary = {f"auxiliary.{name}": module.state_dict() for name, module in self.objective.auxiliary.items()}
        if self.adversary is not None:
            auxiliary["discriminator"] = self.adversary.network.state_dict()
            auxiliary["discriminator_optimizer"] = optimizer_tensors(self.adversary_optimizer.optimizer)
        return {
            "model": self.objective.network.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer.optimizer),
            **self.ema.shadows,
            **auxiliary,
        }

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "config": self.config.given.to_dict(),
            "data": self.data.description.to_dict(),
            "global_batch": self.spot.global_batch,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "meter": self.meter.values.tolist(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def save(self) -> None:
        """Write a checkpoint of the present step; the log and the meter are complete up to it.

        Raises Diverged on all processes where no run could go on from it.
        """
        self._gather_meter()
        fault = ""
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                tensors, keep = self._tensors(), self.run.checkpoints_total_limit
                fault = breakage(tensors["model"], self._start_norm)
                self.sound = is_sound(tensors, next(iter(self.ema.shadows)), self._start_norm, self.skipped_in_a_row)
                try:
                    if not fault:
                        save_checkpoint(self.folder, self.step, tensors, {**self._state(), "sound": self.sound}, keep)
                except NotFinite as error:
                    fault = str(error)
        [fault] = broadcast_object_list([fault])
        if fault:
            self._diverge(f"The run has diverged by step {self.step}, which is not saved: {fault}")

    def _gather_meter(self) -> None:
        """Count on the main process what all have measured."""
        if self.accelerator.num_processes > 1:
            self.meter.values = self.accelerator.reduce(self.meter.values.to(self.accelerator.device)).cpu()
            if not self.accelerator.is_main_process:
                self.meter = LossMeter(self.objective.terms)

    def resume(self) -> bool:
        """Go to the newest checkpoint that verifies; say so. False where the run is new."""
        checkpoint, step, error = None, None, None
        diverged = read_note(self.folder)
        if diverged and all(getattr(self.run, key) == value for key, value in diverged["settings"].items()):
            self._say(f"WARNING: with these settings this run diverged at step {diverged['step']}.")
        if self.accelerator.is_main_process:
            try:
                checkpoint, faults = newest_checkpoint(self.folder)
                step = checkpoint and checkpoint.step
                for fault in faults:
                    self._say(f"WARNING: damaged checkpoint passed over: {fault}")
            except DamagedCheckpoint as damage:
                error = str(damage)
        step, error = broadcast_object_list([step, error])
        if error:
            raise DamagedCheckpoint(error)
        if step is None:
            self._cut_log(0)
            return False
        checkpoint = checkpoint or load_checkpoint(self.folder / f"checkpoint-{step}")
        self._check_same_run(checkpoint.state)
        if checkpoint.step > self.run.max_train_steps:
            raise ValueError(
                f"{self.folder} holds a run of {checkpoint.step} steps, and max_train_steps is"
                f" {self.run.max_train_steps}: give {checkpoint.step} or more to go on, or another --output_dir."
            )
        self._load(checkpoint)
        if self.accelerator.is_main_process:
            set_aside_newer(self.folder, self.step)
        self._cut_log(self.step)
        self._say(f"Resumed from step {self.step} of {self.run.max_train_steps}.")
        return True

    def _check_same_run(self, state: dict[str, Any]) -> None:
        changed = changed_settings(self.config, state)
        if read_note(self.folder) is not None:
            for key in [key for key in changed if key in ADVISED]:
                before, now = changed.pop(key)
                self._say(f"{key} was {before!r}, is {now!r} from here on, as this run once diverged.")
        other_data = self._other_data(state)
        if other_data and changed.keys() == {"sigma_data"} and not self.run.allow_data_change:
            changed = {}  # it was measured on those
        check_settings(self.folder, changed)
        check_global_batch(self.folder, state, self.spot.global_batch)
        if other_data:
            self._allow_data_change(DataDescription.from_dict(state["data"]), other_data)
        before = state["config"]["max_train_steps"]
        if before != self.run.max_train_steps:
            self._say(
                f"max_train_steps was {before}, is {self.run.max_train_steps} now: schedules that"
                " are shares of the run move."
            )

    def _other_data(self, state: dict[str, Any]) -> str:
        """How the dataset differs from that of a checkpoint; empty where it does not, or where that is not known."""
        if "data" not in state:
            self._say("The checkpoint does not say on which images it was trained; whether they changed is unknown.")
            return ""
        return "; ".join(DataDescription.from_dict(state["data"]).differences(self.data.description))

    def _allow_data_change(self, before: DataDescription, differences: str) -> None:
        """Say what is different; ValueError unless that was asked for and the network can take it."""
        fits = before.shape == self.data.description.shape
        if not (fits and self.run.allow_data_change):
            raise ValueError(
                f"{self.folder} holds a run on another dataset: {differences}. Give the dataset that it was trained"
                " on, or another --output_dir"
                + ("; with --allow_data_change the run goes on with this dataset." if fits else ".")
            )
        self._say(f"The dataset is another one from here on, as --allow_data_change says: {differences}.")

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """The network and its averages, which is what `exported` takes."""
        self.objective.network.load_state_dict(checkpoint.tensors["model"])
        for name, shadow in self.ema.shadows.items():
            for key, value in shadow.items():
                value.copy_(checkpoint.tensors[name][key])

    def _load(self, checkpoint: Checkpoint) -> None:
        self.load_weights(checkpoint)
        tensors, state = checkpoint.tensors, checkpoint.state
        load_optimizer_tensors(self.optimizer.optimizer, tensors["optimizer"])
        for name, module in self.objective.auxiliary.items():
            module.load_state_dict(tensors[f"auxiliary.{name}"])
        if self.adversary is not None:
            self.adversary.network.load_state_dict(tensors["discriminator"])
            load_optimizer_tensors(self.adversary_optimizer.optimizer, tensors["discriminator_optimizer"])
        self.step, self.skipped = checkpoint.step, state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.meter = LossMeter(self.objective.terms, state["meter"] if self.accelerator.is_main_process else None)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _cut_log(self, step: int) -> None:
        """Drop the lines of the log after `step`, a line that a kill cut off, and damaged ones, which is said."""
        if not self.accelerator.is_main_process:
            return
        log = read_log(self.log_file, step) if self.log_file.exists() else Log([], 0, False)
        text = "".join(json.dumps(row) + "\n" for row in log.rows)
        damaged = log.damaged + (log.cut and not log.rows)
        if damaged:
            copy = free_name(self.log_file)
            shutil.copyfile(self.log_file, copy)
            said = f"{damaged} damaged line(s) of {self.log_file} are left out; {copy.name} is as it was."
            self._say(f"WARNING: {said}")
        if not log.rows and step >= self.run.logging_steps:
            self._say(f"{self.log_file} holds no line up to step {step}: its curves begin there.")
        if self.log_file.exists() and not holds(self.log_file, text):
            replace_file(self.log_file, text)

    # --- one step ----------------------------------------------------------------------------------------------

    def _batch(self, raw: dict[str, Any], draws: Draws | None = None) -> Batch:
        """Images and labels as they are, or with `draws` as they are trained on."""
        images = raw["images"].to(self.accelerator.device, non_blocking=True)
        if self.data.vae is None:  # else they are latents
            images = images.float() / 127.5 - 1
        condition = Condition(raw["condition"]).to(self.accelerator.device)
        if draws is None:
            return Batch(images, condition)
        if self.config.data.random_flip:
            flip = draws.uniform("flip") < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        if self.config.data.augment:
            images, labels = augment(images, draws, self.config.data.augment)
            condition = condition.also(augment_labels=labels)
        if self.config.model.label_dropout:
            dropped = draws.uniform("label dropout") < self.config.model.label_dropout
            condition = condition.with_nulls(nulls_of(null_class(self.objective.network))).dropped(dropped)
        return Batch(images, condition)

    def _next(self, batches) -> list[dict[str, Any]]:
        """What the forward passes of a step take.

        Raises ValueError on all processes where the stream of one fails, once a checkpoint is written.
        """
        raw, fault = [], None
        try:
            raw = [next(batches) for _ in range(self.spot.accumulation)]
        except StreamFault as error:
            fault = str(error)
        if self.config.data.streaming and self._agree(fault is not None)[0]:
            fault = next(filter(None, gather_object([fault])))
            if not self.step:
                raise ValueError(f"{fault} Nothing is trained yet: repair the dataset, and start again.")
            self.save()
            raise ValueError(
                f"{fault} The run is saved at step {self.step}: repair the dataset, and the same command resumes it."
            )
        return raw

    def _train_step(self, batches, stopping: Stopping) -> tuple[float, bool]:
        """Forward and backward passes and an optimiser's step; gives the gradient norm, and whether to stop."""
        accelerator, passes = self.accelerator, self.spot.accumulation
        player, optimizer = self.objective, self.optimizer
        if self.adversary is not None and self.adversary.has_turn(self.step):
            player, optimizer = self.adversary, self.adversary_optimizer
        losses = []
        for micro, raw in enumerate(self._next(batches)):
            draws = Draws(self.run.seed, self.step, self.spot.rows(micro), accelerator.device)
            self.objective.key_dropout(draws)
            last = micro == passes - 1
            with nullcontext() if last else accelerator.no_sync(player.model):
                loss = player.loss(self._batch(raw, draws), draws)
                accelerator.backward(loss.total / passes)
            losses.append(loss)
        accelerator.unscale_gradients(optimizer)
        gradients = [p.grad for p in player.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite_loss = math.isfinite(sum(loss.total.item() for loss in losses))
        finite = finite_loss and math.isfinite(norm.item())
        trouble, diverged, stop = self._agree(not finite, not finite_loss, stopping.requested != 0)
        if trouble:
            self._skip(diverged)
        else:
            if self.run.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(player.network.parameters(), self.run.max_grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            optimizer.step()
            self.skipped_in_a_row = 0
            for loss in losses:
                self.meter.add(loss.per_sample, loss.sigma, loss.terms)
        optimizer.zero_grad()
        self.step += 1
        if not trouble and player is self.objective:
            images_seen = self.step * self.spot.global_batch
            self.objective.after_step(self.step - 1)
            self.ema.update(images_seen, self.spot.global_batch)
        return norm.item(), stop

    def _agree(self, *flags: bool) -> list[bool]:
        """Each flag, true on all processes where it is on one."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        return (self.accelerator.reduce(torch.tensor(flags, device=self.accelerator.device).float()) > 0).tolist()

    def _skip(self, diverged: bool) -> None:
        """Leave this step out, for a loss that is not finite or else a gradient."""
        scaler = self.accelerator.scaler
        scaled_too_high = scaler is not None and not diverged and scaler.get_scale() > 1
        if scaler is not None:
            scaler.update()  # lowers its scale
        self.skipped += 1
        self.skipped_in_a_row += not scaled_too_high  # which says nothing of the run
        fault = breakage(self.objective.network.state_dict(), self._start_norm)
        if fault:
            self._diverge(f"The run has diverged by step {self.step}: {fault}")
        if self.skipped_in_a_row > self.run.max_skipped_steps:
            self._diverge(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step}, had a loss or a gradient that is not"
                " finite, though the weights are"
            )
        if self.skipped_in_a_row == 1:
            self._say(
                f"WARNING: step {self.step + 1} is left out, as its loss or gradient is not finite; the weights are as"
                " they were. Look at the images if that happens often."
            )

    def _diverge(self, why: str) -> NoReturn:
        """End the run so that it can go on from its newest sound checkpoint."""
        sound = [go_back(self.folder, self.step, self.run) if self.accelerator.is_main_process else None]
        (sound,) = broadcast_object_list(sound)
        moved = self.skipped <= self.step
        raise Diverged(f"{why}; the run ends. " + advice(self.run, self.accelerator.mixed_precision, sound, moved))

    # --- the run -----------------------------------------------------------------------------------------------

    def _log(self, norm: float, seconds_per_step: float) -> dict[str, Any]:
        """Write a line of the log for the steps since the last one."""
        self._gather_meter()
        row = {"step": self.step, **self.meter.read(), "grad_norm": norm, "lr": self.learning_rate(self.step - 1)}
        row |= {"skipped": self.skipped, **self.objective.describe(self.step - 1)}
        row["time"] = {"images_per_second": round(self.spot.global_batch / seconds_per_step, 1)}
        self.meter = LossMeter(self.objective.terms)
        with together(self.accelerator), naming(self.log_file):
            if self.accelerator.is_main_process:
                with open(self.log_file, "a") as file:
                    file.write(json.dumps(row) + "\n")
        if self.run.report_to:
            flat = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            flat |= {f"loss/sigma_{k}": v for k, v in row["loss_by_sigma"].items()}
            self.accelerator.log(flat, step=self.step)
        return row

    def fit(self, stopping: Stopping) -> None:
        """Train to the last step. Raises Stopped if a process was asked for that, once a checkpoint is written."""
        with stopping.held(), closing(self.data.batches(self.spot, self.run.seed, self.step)) as batches:
            self._fit(batches, stopping)

    def _fit(self, batches: Iterator[dict[str, Any]], stopping: Stopping) -> None:
        run, main = self.run, self.accelerator.is_main_process
        bar = tqdm(total=run.max_train_steps, initial=self.step, desc=self.config.method, disable=not main)
        clock, clock_step = time.perf_counter(), self.step
        try:
            while self.step < run.max_train_steps:
                norm, stop = self._train_step(batches, stopping)
                bar.update()
                last = self.step == run.max_train_steps
                if last or self.step % run.logging_steps == 0:
                    now = time.perf_counter()
                    row = self._log(norm, (now - clock) / max(1, self.step - clock_step))
                    clock, clock_step = now, self.step
                    bar.set_postfix(loss=row["loss"], skipped=self.skipped, **self.objective.describe(self.step - 1))
                if stop or last or self.step % run.checkpointing_steps == 0:
                    self.save()
                    with together(self.accelerator):
                        if main and not last and self.sound:  # the last step is exported anyway
                            self.on_save()
                if stop:
                    then, where = "exports the model" if last else "goes on", f"{self.step} of {run.max_train_steps}"
                    raise stopping.stopped(f"at step {where}, which is saved; the same command {then}.")
                if run.validation_steps and (last or self.step % run.validation_steps == 0):
                    with together(self.accelerator):
                        if main:
                            self._draw()
        finally:
            bar.close()

    def _draw(self) -> None:
        """Pictures of the model as it would be exported now: samples, what it makes of noise, losses."""
        pipeline, name = self.exported(), self.folder / "samples" / f"step-{self.step:07d}"
        save_preview(pipeline, name.with_suffix(".png"))
        if self._shown is None:
            self._shown = next(self.data.batches(ProcessShare(8, 1, 0, 1), self.run.seed))
        batch = self._batch(self._shown)
        if self.data.vae is None and batch.samples.shape[1] in (1, 3):
            numbers = save_diagnostics(
                self.objective.denoiser(pipeline.unet),
                batch.samples,
                batch.condition,
                name.with_name(f"{name.name}-diagnostics.png"),
                self.objective.teacher,
                self.objective.spec.sigma_max,
                pipeline.unet if self.objective.needs_tangents else None,
            )
            if numbers:
                self._say(f"Step {self.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items()))
        if self.log_file.exists():
            plot_losses(self.log_file, self.folder / "losses.png")

    def exported(self):
        """The pipeline with the first average of the weights, or the weights themselves where asked for."""
        online = self.run.export_weights == "online"
        weights = self.objective.network.state_dict() if online else next(iter(self.ema.shadows.values()))
        config = {k: v for k, v in self.objective.network.config.items() if k != "_name_or_path"}  # a path of here
        # settings given by position stand among `_use_default_values`, which from_config would leave out
        network = type(self.objective.network).from_config({**config, "_use_default_values": []})
        network.load_state_dict(weights)
        pipeline = self.objective.pipeline(network.to(self.accelerator.device).eval())
        return pipeline if self.data.vae is None else with_vae(pipeline, self.data.vae)
