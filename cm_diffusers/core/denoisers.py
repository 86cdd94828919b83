"""From a network's output to a denoiser D(x, sigma), the estimate of the clean data that every method uses.

Every denoiser takes x = x0 + sigma noise, the scale of VE, whatever process its network was trained on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.core.arrays import append_dims
from cm_diffusers.core.conditions import NOTHING, Condition, Rewired, call_network
from cm_diffusers.core.guidance import guide
from cm_diffusers.core.interpolants import VP, Interpolant, LinearFlow, TrigFlow
from cm_diffusers.core.parameterisation import edm_scalings, jump_scalings, read_out_on_process
from cm_diffusers.core.time_labels import LABELS_OF_PREDICTION, TIME_LABELS


PROCESS_PREDICTIONS = tuple(prediction for prediction in LABELS_OF_PREDICTION if prediction != "edm")


@dataclass(frozen=True)
class EDMDenoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, label(sigma)) for a network F.

    Args:
        network: called as `network(sample, label)` with the condition; returns an object with the tensor `sample`.
        sigma_data: root mean square of the data.
        sigma_min: the noise level at which D is the identity.
        time_label: a key of `TIME_LABELS`.
    """

    network: Callable
    sigma_data: float
    sigma_min: float = 0.0
    time_label: str = "log_sigma"

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """Denoise `x` (B, ...) at the noise levels `sigma` (B,), given `condition`."""
        c_skip, c_out, c_in = (append_dims(c, x) for c in edm_scalings(sigma, self.sigma_data, self.sigma_min))
        label = TIME_LABELS[self.time_label].from_sigma(sigma, self.sigma_data)
        output = call_network(self.network, c_in * x, label, condition=condition).sample
        return c_skip * x + c_out * output.to(x.dtype)  # Karras et al. 2022, eq. 7


@dataclass(frozen=True)
class TrajectoryDenoiser:
    """D(x, sigma) = G(x, sigma, sigma_min): the jumps of a consistency trajectory model as a denoiser.

    The network F has two times: t, that of its input, and s, the target of the jump. Under EDM's scalings without a
    floor (Kim et al. 2023, arXiv:2310.02279),

        g(x, t, s) = c_skip(t) x + c_out(t) F(c_in(t) x, label(t), label(s))
        G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)                                            (eq. 9)

    so that G(x, t, t) = x for any network; g(x, t, t) is the denoiser of the probability-flow ODE. A network of
    another process receives its input and its times on that process; g is the clean sample that its output means.

    Args:
        network: called as `network(sample, label, target_timestep=label of s)` with the condition; returns an object
            with the tensor `sample`.
        sigma_data: root mean square of the data.
        sigma_min: the noise level that stands for clean data; above 0 for the label "log_sigma".
        time_label: a key of `TIME_LABELS`, for "edm".
        prediction: one of `JUMP_PREDICTIONS`.
        process: the forward process of the network, for predictions other than "edm".
        time_scale: factor from the times of the process to the time inputs of the network.
    """

    network: Callable
    sigma_data: float
    sigma_min: float = 0.002
    time_label: str = "log_sigma"
    prediction: str = "edm"
    process: Interpolant | None = None
    time_scale: float = 1.0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """The jump of `x` (B, ...) from `sigma` (B,) to `sigma_min`, given `condition`."""
        return self.jump(x, sigma, torch.full_like(sigma, self.sigma_min), condition)

    def jump(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, condition: Condition | None = None) -> Tensor:
        """The jump G of `x` (B, ...) from `sigma` (B,) to `sigma_to` (B,), given `condition`."""
        return self._move(x, sigma, sigma_to, self._output(x, sigma, sigma_to, condition))

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """The estimate g(x, sigma, sigma) of the clean data, for `x` (B, ...) at `sigma` (B,), given `condition`."""
        return self._move(x, sigma, torch.zeros_like(sigma), self._output(x, sigma, sigma, condition))

    def _move(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, output: Tensor) -> Tensor:
        keep, change = jump_scalings(self.prediction, sigma, sigma_to, self.sigma_data)
        return append_dims(keep, x) * x + append_dims(change, x) * output  # eq. 9

    def _output(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, condition: Condition | None) -> Tensor:
        """F(c_in(sigma) x, label(sigma), label(sigma_to)) in the dtype of `x`."""
        process = self.process or TrigFlow(self.sigma_data)  # EDM's c_in puts a sample on this process
        network_input = append_dims(process.alpha(sigma) / process.scale, x) * x
        label, target = (self._label(s) for s in (sigma, sigma_to))
        output = call_network(self.network, network_input, label, condition=condition, target_timestep=target)
        return output.sample.to(x.dtype)

    def _label(self, sigma: Tensor) -> Tensor:
        if self.process is None:
            return TIME_LABELS[self.time_label].from_sigma(sigma, self.sigma_data)
        return self.time_scale * self.process.time(sigma)


@dataclass(frozen=True)
class ProcessDenoiser:
    """D of a network that predicts on its own forward process, x_t = alpha x0 + std noise.

    The factor alpha(sigma) turns a VE sample into one of the process, and `to_denoised` reads the network's output.
    D(x, 0) = x for every prediction but "sample".

    A table of integer times has a highest level, sigma_max. Above it `x` is shrunk onto that level:
    D(x, sigma) = D(x sigma_max / sigma, sigma_max), because x / sigma hardly moves along trajectories there. Below
    the lowest level the network receives time 0.

    Args:
        network: called as `network(x_t / process.scale, time)` with the condition; returns an object with the tensor
            `sample`.
        process: the forward process.
        prediction: one of `PROCESS_PREDICTIONS`.
        sigma_data: root mean square of the data; the denoiser itself does not need it.
        time_scale: factor from the time of the process to the time input of the network (1000 for diffusers' flow
            models).
    """

    network: Callable
    process: Interpolant
    prediction: str
    sigma_data: float | None = None
    time_scale: float = 1.0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """Denoise `x` (B, ...) at the noise levels `sigma` (B,), given `condition`."""
        x = append_dims((self.process.sigma_max / sigma).clamp(max=1), x) * x
        sigma = sigma.clamp(max=self.process.sigma_max)
        x_t = append_dims(self.process.alpha(sigma), x) * x
        time = self.time_scale * self.process.time(sigma)
        output = call_network(self.network, x_t / self.process.scale, time, condition=condition).sample.to(x.dtype)
        return to_denoised(self.prediction, output, x_t, sigma, self.process)


def trigflow_denoiser(network: Callable, sigma_data: float) -> ProcessDenoiser:
    """D = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t) at the angle t = atan(sigma / sigma_data).

    F, the `network`, predicts the velocity over `sigma_data` of x_t = cos(t) x0 + sin(t) sigma_data noise (Lu & Song
    2024, arXiv:2410.11081, section 3). This is EDM's preconditioning with the opposite sign of the network.
    """
    return ProcessDenoiser(network, TrigFlow(sigma_data), "trigflow", sigma_data)


def flow_denoiser(network: Callable, sigma_data: float | None = None, time_scale: float = 1.0) -> ProcessDenoiser:
    """D = x_t - t u(x_t, t) at the flow time t = sigma / (1 + sigma), for a `network` u that predicts noise - x0.

    x_t = (1 - t) x0 + t noise: rectified flow, flow matching (Lipman et al. 2022, arXiv:2210.02747). The network
    receives `time_scale` times t. `sigma_data` is only stored.
    """
    return ProcessDenoiser(network, LinearFlow(), "flow", sigma_data, time_scale)


def jump_to_zero(network: Callable, time_scale: float = 1.0) -> ProcessDenoiser:
    """The jumps of a `network` with two times from any flow time to 0, as a denoiser.

    The network receives `time_scale` times both flow times.
    """

    def to_zero(x: Tensor, t: Tensor, **condition: Tensor) -> Any:
        return network(x, t, target_timestep=torch.zeros_like(t), **condition)

    return flow_denoiser(Rewired(network, to_zero), time_scale=time_scale)


@dataclass(frozen=True)
class Guided:
    """D_null + w (D - D_null): classifier-free guidance of scale w (Ho & Salimans 2022, arXiv:2207.12598, eq. 6).

    Args:
        denoiser: the denoiser of a conditional model.
        scale: w, one for all samples or one per sample (B,); 1 gives `denoiser` itself.
        nulls: the null row of this model for each entry of its condition.
    """

    denoiser: EDMDenoiser | TrajectoryDenoiser | ProcessDenoiser
    scale: float | Tensor
    nulls: Mapping[str, Tensor]

    @property
    def network(self) -> Callable:
        return self.denoiser.network

    @property
    def sigma_data(self) -> float | None:
        return self.denoiser.sigma_data

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Denoise `x` (B, ...) at the noise levels `sigma` (B,), guided by `condition`."""
        x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        condition = condition.with_nulls(self.nulls)
        return guide(lambda both: self.denoiser(x, sigma, both), condition, condition.dropped(), self.scale)


Denoiser = EDMDenoiser | TrajectoryDenoiser | ProcessDenoiser | Guided


def as_trigflow(network: Callable, sigma_data: float, time_scale: float = 1.0) -> Callable:
    """The TrigFlow network F with the same denoiser as a flow model u; both are called like a model's network.

    With m = cos(t) + sigma_data sin(t), the same point is x / m in the scale of linear flow, at the flow time
    sigma_data sin(t) / m. Equal denoised images require

        F(x / sigma_data, t) = ((sigma_data cos(t) - sin(t)) x / sigma_data + u(x / m, sigma_data sin(t) / m)) / m

    Args:
        network: u, which receives `time_scale` times the flow time.
        sigma_data: the sigma_data of TrigFlow.
        time_scale: see `ProcessDenoiser`.
    """

    def F(x: Tensor, t: Tensor, **condition: Tensor) -> SimpleNamespace:
        cos, sin = t.cos(), sigma_data * t.sin()
        m = append_dims(cos + sin, x)
        output = network(sigma_data * x / m, time_scale * sin / (cos + sin), **condition)
        keep = append_dims(sigma_data * cos - sin / sigma_data, x)
        sample = (keep * x + output.sample.to(x.dtype)) / m
        return SimpleNamespace(sample=sample, log_variance=getattr(output, "log_variance", None))

    return Rewired(network, F)


def vp_as_trigflow(network: Callable, process: VP, prediction: str, sigma_data: float) -> Callable:
    """The TrigFlow network F with the same denoiser as a VP network; both are called like a model's network.

    With alpha = 1 / sqrt(1 + sigma_data^2 tan(t)^2), the same point is alpha sigma_data x / cos(t) in the scale of VP.
    Equal denoised images require

        F(x, t) = (epsilon - sin(t) x) / cos(t) = alpha v / cos(t) + (sigma_data^2 - 1) tan(t) alpha^2 x

    Args:
        network: predicts `prediction`. It receives times of the process's table, and times between them.
        process: the process of `network`.
        prediction: "epsilon" or "v_prediction".
        sigma_data: the sigma_data of TrigFlow.
    """

    def F(x: Tensor, t: Tensor, **condition: Tensor) -> SimpleNamespace:
        sigma = sigma_data * t.tan()
        cos, alpha = append_dims(t.cos(), x), append_dims(process.alpha(sigma), x)
        output = network(alpha * sigma_data * x / cos, process.time(sigma), **condition).sample.to(x.dtype)
        if prediction == "epsilon":
            return SimpleNamespace(sample=(output - append_dims(t.sin(), x) * x) / cos)
        excess = (sigma_data**2 - 1) * append_dims(t.tan(), x) * alpha**2
        return SimpleNamespace(sample=alpha * output / cos + excess * x)

    return Rewired(network, F)


def trigflow_velocity(
    denoiser: Denoiser, x: Tensor, t: Tensor, sigma_data: float, condition: Condition = NOTHING
) -> Tensor:
    """The velocity dx/dt (B, ...) of TrigFlow's probability-flow ODE, from any denoiser.

    It follows from D = cos(t) x - sin(t) dx/dt. Networks of other processes serve as well: the same point is
    x / cos(t) in VE, at sigma = sigma_data tan(t).

    Args:
        denoiser: D(x, sigma, condition), which takes x in the scale of VE.
        x: the sample (B, ...) in TrigFlow's scale.
        t: its angles (B,) in (0, pi/2).
        sigma_data: root mean square of the data.
        condition: B rows, or `NOTHING`.
    """
    cos, sin = append_dims(t.cos(), x), append_dims(t.sin(), x)
    return (cos * x - denoiser(x / cos, sigma_data * t.tan(), condition)) / sin


def to_denoised(prediction_type: str, output: Tensor, x: Tensor, sigma: Tensor, interpolant: Interpolant) -> Tensor:
    """The estimate of the clean data from a network's output, for a process other than EDM's.

    Args:
        prediction_type: what the network predicts.

            - "sample": x0.
            - "epsilon": the noise.
            - "v_prediction": alpha noise - std x0, for alpha^2 + std^2 = 1.
            - "flow": noise - x0, for alpha + std = 1.
            - "trigflow": F, the velocity over sigma_data, so that x0 = cos(t) x - sin(t) sigma_data F.
        output: the network's output (B, ...).
        x: the noisy sample (B, ...) in the interpolant's own scale.
        sigma: its noise-to-signal ratio (B,); finite for "epsilon", which does not determine x0 from pure noise.
        interpolant: the forward process.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type not in PROCESS_PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PROCESS_PREDICTIONS)}; got {prediction_type!r}.")
    alpha, std = append_dims(interpolant.alpha(sigma), x), append_dims(interpolant.std(sigma), x)
    return read_out_on_process(prediction_type, output, x, alpha, std)


def from_denoised(
    prediction_type: str, denoised: Tensor, x: Tensor, sigma: Tensor, interpolant: Interpolant
) -> Tensor:
    """The network output that means `denoised`: the inverse of `to_denoised`, for sigma > 0.

    Args:
        prediction_type: what the network predicts, as in `to_denoised`.
        denoised: the estimate (B, ...) of the clean data.
        x: the noisy sample (B, ...) in the interpolant's own scale.
        sigma: its noise-to-signal ratio (B,), above 0.
        interpolant: the forward process.

    Raises:
        ValueError: unknown prediction type.
    """
    alpha, std = append_dims(interpolant.alpha(sigma), x), append_dims(interpolant.std(sigma), x)
    if prediction_type == "sample":
        return denoised
    if prediction_type == "epsilon":
        return (x - alpha * denoised) / std
    if prediction_type in ("v_prediction", "trigflow"):
        return (alpha * x - denoised) / std
    if prediction_type == "flow":
        return (x - denoised) / std
    raise ValueError(f"prediction_type must be one of {', '.join(PROCESS_PREDICTIONS)}; got {prediction_type!r}.")
