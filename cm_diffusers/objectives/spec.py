"""The parameterisation of a network: its prediction, its forward process and its time input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffusers import DDPMScheduler

from cm_diffusers.core.denoisers import (
    Denoiser,
    EDMDenoiser,
    ProcessDenoiser,
    TrajectoryDenoiser,
    as_trigflow,
    vp_as_trigflow,
)
from cm_diffusers.core.interpolants import VE, VP, Interpolant, LinearFlow, TrigFlow
from cm_diffusers.core.parameterisation import JUMP_PREDICTIONS


PROCESS_STUDENTS = tuple(p for p in JUMP_PREDICTIONS if p != "edm")  # their denoisers are the identity at sigma 0


@dataclass(frozen=True)
class ModelSpec:
    """The parameterisation that makes a bare network a denoiser, in training, sampling and export alike.

    Args:
        sigma_data: root mean square of the data, above 0. It is None for a saved model that does not state it, until
            the engine replaces it by that of the data.
        time_label: the network's time input, one of the labels in `LABELS_OF_PREDICTION`.
        sigma_max: the level of pure noise, where sampling starts.
        prediction: a key of `LABELS_OF_PREDICTION`. The process of "edm" is VE, that of "flow" linear flow, that of
            "trigflow" TrigFlow. "epsilon", "v_prediction" and "sample" have a discrete VP process.
        time_scale: factor from the flow time to the time input of a flow model.
        noise_schedule: the settings of diffusers' `DDPMScheduler` that define the VP process.
    """

    sigma_data: float
    time_label: str = "log_sigma"
    sigma_max: float = 80.0
    prediction: str = "edm"
    time_scale: float = 1.0
    noise_schedule: Mapping[str, Any] | None = None

    @cached_property
    def process(self) -> Interpolant:
        """The forward process of the network."""
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
        """The settings of the network's input and prediction, for schedulers and pipelines of the library."""
        names = ("prediction", "time_label", "time_scale", "noise_schedule")
        return {name: getattr(self, name) for name in names}

    def denoiser(self, network: Callable, floor: float = 0.0) -> Denoiser:
        """The denoiser D of `network`. It is the identity at `floor` under EDM's scalings, otherwise at 0."""
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
        """The jumps and the denoiser of a `network` with two times; the level `floor` stands for clean data."""
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
        """The highest frequency in the embedding of a second time, in radians per unit of the time input.

        It is 4 for an angle or ln(sigma) / 4, and 4 over the whole range of flow times or timesteps. The time input
        250 ln(sigma) has a wider range, and therefore a lower frequency: 1 / 250.
        """
        if isinstance(self.process, VP):
            return 4 / len(self.process.angles)
        return 1 / 250 if self.time_label == "log_sigma" else 4 / self.time_scale

    def as_trigflow(self, network: Callable) -> Callable:
        """The TrigFlow network F with the same denoiser: a TrigFlow `network` itself, or another one converted."""
        if self.prediction == "flow":
            return as_trigflow(network, self.sigma_data, self.time_scale)
        if isinstance(self.process, VP):
            return vp_as_trigflow(network, self.process, self.prediction, self.sigma_data)
        return network
