"""The state of a run, as a checkpoint holds it: networks, averages, optimisers and counters."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cm_diffusers.core.denoisers import Guided
from cm_diffusers.core.draws import Draws, draws_by
from cm_diffusers.core.ema import EMA, ConstantDecay, HalfLife
from cm_diffusers.core.frozen import changing_state, load_changing_state
from cm_diffusers.engine.checkpoint import Checkpoint
from cm_diffusers.engine.config import RunArguments
from cm_diffusers.engine.training.divergence import norm
from cm_diffusers.engine.training.meter import LossMeter
from cm_diffusers.engine.training.optimisers import build_optimizer, load_optimizer_tensors, optimizer_tensors
from cm_diffusers.engine.training.precision import CastPass
from cm_diffusers.engine.training.skipping import Skipped, SkippedSteps
from cm_diffusers.objectives import Objective


def average_profiles(run: RunArguments) -> list[HalfLife | ConstantDecay]:
    """The averages (EMA) of the weights that `run` asks for; the first one is exported."""
    half_lives = [HalfLife(kimg, run.ema_rampup) for kimg in run.ema_half_life or []]
    return [*half_lives, *(ConstantDecay(decay) for decay in run.ema_decay or [])]


def exported_weights(tensors: Mapping[str, Mapping[str, Tensor]], run: RunArguments) -> Mapping[str, Tensor]:
    """The weights to export: the first average, or the online weights with `export_weights` "online".

    Args:
        tensors: groups of tensors (any shape) as a checkpoint holds them.
        run: the settings of the run.
    """
    return tensors["model" if run.export_weights == "online" else average_profiles(run)[0].name]


class RunState:
    """The state of a run; the initial state until `load` is called.

    The constructor prepares the networks of `objective` for `accelerator`, and attaches the objective to them.

    Args:
        objective: the training method.
        run: the settings that choose the optimiser and the averages.
        accelerator: the processes and devices of the run.
    """

    def __init__(self, objective: Objective, run: RunArguments, accelerator: Accelerator):
        self.objective, self.run, self.accelerator = objective, run, accelerator
        network = objective.network.to(accelerator.device)
        teacher = [objective.teacher.network] if objective.teacher is not None else []
        for module in (*objective.auxiliary.values(), *teacher):
            accelerator.prepare_model(module, evaluation_mode=True)
            if run.compile:
                module.compile()
        if isinstance(objective.teacher, Guided):
            nulls = {name: null.to(accelerator.device) for name, null in objective.teacher.nulls.items()}
            objective.teacher = replace(objective.teacher, nulls=nulls)
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(network, run))
        model = accelerator.prepare_model(CastPass(torch.compile(network) if run.compile else network))
        model.train()
        objective.attach(model, lambda value: accelerator.reduce(value, "mean"))
        self.adversary = objective.adversary
        if self.adversary is not None:
            discriminator = self.adversary.network.to(accelerator.device)
            self.adversary_optimizer = accelerator.prepare_optimizer(self.adversary.optimizer())
            self.adversary.attach(accelerator.prepare_model(discriminator))
        self.ema = EMA(network, average_profiles(run))
        self.start_norm = norm(self.weights().values())
        self.step = 0
        self.draws = Draws
        self.skips = SkippedSteps(accelerator)
        self.meter = self.new_meter()

    def new_meter(self, values: list | None = None) -> LossMeter:
        """A meter of the losses that continues from `values`."""
        return LossMeter(self.objective.terms, values, self.accelerator.device)

    def weights(self) -> dict[str, Tensor]:
        """The weights (any shape) of the network by name, without copies and without frozen ones."""
        return changing_state(self.objective.network, self.objective.network)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups of tensors (any shape) by name, without copies."""
        network = self.objective.network
        auxiliary = {
            f"auxiliary.{name}": changing_state(module, network) for name, module in self.objective.auxiliary.items()
        }
        if self.adversary is not None:
            auxiliary["discriminator"] = self.adversary.network.state_dict()
            auxiliary["discriminator_optimizer"] = optimizer_tensors(self.adversary_optimizer.optimizer)
        return {
            "model": self.weights(),
            "optimizer": optimizer_tensors(self.optimizer.optimizer),
            **self.ema.shadows,
            **auxiliary,
        }

    def values(self, skipped: Skipped) -> dict[str, Any]:
        """The rest of the state, as values for JSON, with the last look at the skipped steps."""
        scaler = self.accelerator.scaler
        return {
            "skipped": skipped.count,
            "skipped_in_a_row": skipped.in_a_row,
            "meter": self.meter.values.tolist(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "draws": self.draws.rule,
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Load the state of `checkpoint`, which holds the results of `tensors` and `values`.

        Raises:
            ValueError: a later version began the run, and this one does not know its random numbers.
        """
        tensors, values = checkpoint.tensors, checkpoint.state
        self.draws = draws_by(values.get("draws", 1))  # the first runs recorded no rule
        network = self.objective.network
        load_changing_state(network, network, tensors["model"])
        for name, shadow in self.ema.shadows.items():
            for key, value in shadow.items():
                value.copy_(tensors[name][key])
        load_optimizer_tensors(self.optimizer.optimizer, tensors["optimizer"])
        for name, module in self.objective.auxiliary.items():
            load_changing_state(module, network, tensors[f"auxiliary.{name}"])
        if self.adversary is not None:
            self.adversary.network.load_state_dict(tensors["discriminator"])
            load_optimizer_tensors(self.adversary_optimizer.optimizer, tensors["discriminator_optimizer"])
        self.step = checkpoint.step
        self.skips = SkippedSteps(self.accelerator, values["skipped"], values["skipped_in_a_row"])
        self.meter = self.new_meter(values["meter"] if self.accelerator.is_main_process else None)
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])

    def gather_meter(self) -> None:
        """Add the losses of all processes to the meter of the main process, and empty the other meters."""
        if self.accelerator.num_processes > 1:
            self.meter.values = self.accelerator.reduce(self.meter.values)
            if not self.accelerator.is_main_process:
                self.meter = self.new_meter()
