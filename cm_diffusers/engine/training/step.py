"""One training step, with the same result on any number of processes."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.data.streams import StreamFault
from cm_diffusers.engine.processes import agreed
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.batches import as_they_are, as_trained, cropped
from cm_diffusers.engine.training.optimisers import LearningRate, step_unless
from cm_diffusers.engine.training.state import RunState
from cm_diffusers.objectives import Loss


AGREED = 10  # steps between two agreements on a stop


class StepResult(NamedTuple):
    """The result of a training step.

    Args:
        norm: () the norm of the gradient before clipping, on the device.
        stop: whether any process was asked to stop.
    """

    norm: Tensor
    stop: bool


class TrainingStep:
    """Takes one training step for each call.

    On a GPU it launches the step's work and does not wait for it. If a loss or gradient is not finite on any process,
    the weights and the optimiser stay as they are on all of them.

    Args:
        config: the settings.
        data: the dataset, of images or latents.
        state: the state of the run, which a step changes.
        share: the part of each global batch that this process takes.
        accelerator: the processes and devices of the run.
    """

    def __init__(
        self, config: Config, data: ImageData, state: RunState, share: ProcessShare, accelerator: Accelerator
    ):
        self.config, self.run, self.data, self.state, self.share = config, config.run, data, state, share
        self.accelerator = accelerator
        self.learning_rate = LearningRate(config.run)

    def __call__(self, batches: Iterator[dict[str, Any]], stopping: Stopping) -> StepResult:
        """Take the next training step.

        Args:
            batches: the micro-batches of this process, from `data.batches`.
            stopping: requests to stop, which the processes share.

        Raises:
            StreamFault: a process gets no images. It is raised on all processes, before the state changes.
        """
        state, objective, accelerator = self.state, self.state.objective, self.accelerator
        player, optimizer = objective, state.optimizer
        if state.adversary is not None and state.adversary.has_turn(state.step):
            player, optimizer = state.adversary, state.adversary_optimizer

        # draws and losses
        losses = []
        for micro, raw in enumerate(self._rows(batches)):
            draws = state.draws(self.run.seed, state.step, self.share.rows(micro), accelerator.device)
            objective.key_dropout(draws)
            last = micro == self.share.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(player.model):
                rows = as_they_are(cropped(raw, self.data, draws), self.data, accelerator.device)
                batch = as_trained(rows, draws, self.config, objective)
                loss = player.loss(batch, draws)
                shown = torch.where(loss.total.isfinite(), 1.0, torch.nan)  # to all gradients
                accelerator.backward(loss.total * shown / self.share.accumulation)
            losses.append(loss)

        # skip, or step
        accelerator.unscale_gradients(optimizer)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        self._step(optimizer.optimizer, weights, norm, losses)
        optimizer.zero_grad()
        state.step += 1

        # averages
        if player is objective:
            objective.after_step(state.step - 1)
            state.ema.update(state.step * self.share.global_batch, self.share.global_batch)
        return StepResult(norm, self._asked_to_stop(stopping))

    def _rows(self, batches: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of the dataset for each forward pass of the step."""
        rows, fault = [], None
        try:
            rows = [next(batches) for _ in range(self.share.accumulation)]
        except StreamFault as error:
            fault = str(error)
        if self.config.data.streaming and agreed(self.accelerator, fault is not None)[0]:
            raise StreamFault(next(filter(None, gather_object([fault]))))
        return rows

    def _step(self, optimizer: torch.optim.Optimizer, weights: list[Tensor], norm: Tensor, losses: list[Loss]) -> None:
        """Step the optimiser and count the losses, unless the norm of the gradient is not finite."""
        state, scaler = self.state, self.accelerator.scaler
        skipped, is_fault = ~norm.isfinite(), torch.ones((), dtype=torch.bool, device=norm.device)
        if scaler is not None:  # a scale that is too high is not a fault of the run
            finite = torch.stack([loss.total.detach() for loss in losses]).isfinite().all()
            is_fault = ~finite | (scaler._get_scale_async() <= 1)
        if self.run.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(weights, self.run.max_grad_norm, norm)
        for group in state.optimizer.param_groups:
            group["lr"] = self.learning_rate(state.step)
        step_unless(optimizer, skipped)
        if scaler is not None:
            scaler.update()
        state.skips.add(skipped, is_fault, state.step + 1)
        for loss in losses:
            state.meter.add(loss.per_sample, loss.sigma, loss.terms, left_out=skipped)

    def _asked_to_stop(self, stopping: Stopping) -> bool:
        """Whether any process was asked to stop. Several GPUs agree on it every 10 steps, as they wait for it."""
        if self.accelerator.num_processes > 1 and self.accelerator.device.type != "cpu" and self.state.step % AGREED:
            return False
        return agreed(self.accelerator, stopping.requested != 0)[0]
