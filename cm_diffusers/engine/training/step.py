"""One training step, with the same result on any number of processes."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.data.streams import StreamFault
from cm_diffusers.engine.processes import agreed
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.batches import as_they_are, as_trained, cropped
from cm_diffusers.engine.training.optimisers import LearningRate
from cm_diffusers.engine.training.state import RunState
from cm_diffusers.objectives import Loss


class StepResult(NamedTuple):
    """The result of a training step.

    Args:
        norm: the norm of this process's gradient before clipping.
        skipped: whether the step was skipped on all processes, because a loss or gradient was not finite.
        stop: whether any process was asked to stop.
    """

    norm: float
    skipped: bool
    stop: bool


class TrainingStep:
    """Takes one training step for each call.

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
                accelerator.backward(loss.total / self.share.accumulation)
            losses.append(loss)

        # agreement
        accelerator.unscale_gradients(optimizer)
        gradients = [p.grad for p in player.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite_loss = math.isfinite(sum(loss.total.item() for loss in losses))
        finite = finite_loss and math.isfinite(norm.item())
        skipped, diverged, stop = agreed(accelerator, not finite, not finite_loss, stopping.requested != 0)

        # skip, or step
        if skipped:
            self._skip(diverged)
        else:
            self._step(player.network, optimizer, norm, losses)
        optimizer.zero_grad()
        state.step += 1

        # averages
        if not skipped and player is objective:
            objective.after_step(state.step - 1)
            state.ema.update(state.step * self.share.global_batch, self.share.global_batch)
        return StepResult(norm.item(), skipped, stop)

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

    def _step(self, network: nn.Module, optimizer: Any, norm: torch.Tensor, losses: list[Loss]) -> None:
        if self.run.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), self.run.max_grad_norm, norm)
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.state.step)
        optimizer.step()
        self.state.skipped_in_a_row = 0
        for loss in losses:
            self.state.meter.add(loss.per_sample, loss.sigma, loss.terms)

    def _skip(self, diverged: bool) -> None:
        scaler = self.accelerator.scaler
        scaled_too_high = scaler is not None and not diverged and scaler.get_scale() > 1
        if scaler is not None:
            scaler.update()  # lowers the scale
        self.state.skipped += 1
        self.state.skipped_in_a_row += not scaled_too_high  # a scale that is too high is not a fault of the run
