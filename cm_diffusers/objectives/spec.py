"""What a network predicts, on which forward process, and how it is told the time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffusers import DDPMScheduler

from cm_diffusers.core.denoisers import Denoiser, EDMDenoiser, ProcessDenoiser, TrajectoryDenoiser, as_trigflow
from cm_diffusers.core.interpolants import VE, VP, Interpolant, LinearFlow, TrigFlow
from cm_diffusers.core.parameterisation import JUMP_PREDICTIONS


PROCESS_STUDENTS = tuple(p for p in JUMP_PREDICTIONS if p != "edm")  # the identity at sigma 0 as they are


@dataclass(frozen=True)
class ModelSpec:
    """What turns the bare network into a denoiser, in training, sampling and export alike.

    Args:
        sigma_data: root mean square of the data, > 0. The spec of a saved model that does not say has None, until the
            engine puts the data's in its place.
        time_label: the network's time input, one of `LABELS_OF_PREDICTION`.
        sigma_max: the level of pure noise, where sampling starts.
        prediction: a key of `LABELS_OF_PREDICTION`: "edm" lives on VE, "flow" on linear flow, "trigflow" on TrigFlow,
            and "epsilon", "v_prediction" and "sample" on a discrete VP process.
        time_scale: a flow model is told this times the flow time.
        noise_schedule: the settings of diffusers' `DDPMScheduler` that make the VP process.
    """

    sigma_data: float
    time_label: str = "log_sigma"
    sigma_max: float = 80.0
    prediction: str = "edm"
    time_scale: float = 1.0
    noise_schedule: Mapping[str, Any] | None = None

    @cached_property
    def process(self) -> Interpolant:
        """The forward process that the network lives on."""
        if self.prediction == "edm":
            return VE()
        if self.prediction == "trigflow":
            return TrigFlow(self.sigma_data)
        if self.prediction == "flow":
            return LinearFlow()
        assert self.noise_schedule is not None
        return VP(DDPMScheduler(**self.noise_schedule).alphas_cumprod)

    @property
    def input_config(self) -> dict[str, Any]:
        """What schedulers and pipelines of the library are told of the network's input and prediction."""
        names = ("prediction", "time_label", "time_scale", "noise_schedule")
        return {name: getattr(self, name) for name in names}

    def denoiser(self, network: Callable, floor: float = 0.0) -> Denoiser:
        """D of `network`; the identity at `floor` under EDM's scalings, at 0 otherwise."""
        if self.prediction == "edm":
            return EDMDenoiser(network, self.sigma_data, floor, self.time_label)
        return ProcessDenoiser(
            network,
            self.process,
            prediction=self.prediction,
            sigma_data=self.sigma_data,
            time_scale=self.time_scale,
        )

    def trajectories(self, network: Callable, floor: float) -> TrajectoryDenoiser:
        """The jumps of a `network` with two times, and its denoiser; `floor` stands for clean data."""
        return TrajectoryDenoiser(
            network,
            self.sigma_data,
            sigma_min=floor,
            time_label=self.time_label,
            prediction=self.prediction,
            process=None if self.prediction == "edm" else self.process,
            time_scale=self.time_scale,
        )

    @property
    def frequency(self) -> float:
        """How fast a second time in the unit of the first is read at most, in radians per unit of it.

        Four radians for an angle or for all times of a process; for logarithms of sigma, whose range is wider, 250 ln
        sigma in 1 / 250.
        """
        if isinstance(self.process, VP):
            return 4 / len(self.process.angles)
        return 1 / 250 if self.time_label == "log_sigma" else 4 / self.time_scale

    def as_trigflow(self, network: Callable) -> Callable:
        """F of TrigFlow that means the same denoiser: a TrigFlow `network` itself, a flow model by its own formula."""
        if self.prediction == "flow":
            return as_trigflow(network, self.sigma_data, self.time_scale)
        return network
