"""From a network's output to a denoiser D(x, sigma), the estimate of the clean data that every method speaks.

Whatever process a network was trained on, its denoiser takes x = x0 + sigma noise, the scale of VE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cm_diffusers.core.interpolants import Interpolant, LinearFlow, TrigFlow, append_dims
from cm_diffusers.core.time_labels import TIME_LABELS


PREDICTION_TYPES = ("sample", "epsilon", "v_prediction", "flow_prediction", "trigflow")


def edm_scalings(sigma: Tensor, sigma_data: float, sigma_min: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in at `sigma`, any shape (Karras et al. 2022, table 1).

    With a floor `sigma_min` > 0 they are those of the consistency models (Song et al. 2023, arXiv:2303.01469, app. C),
    for which D(x, sigma_min) = x; with 0 they are EDM's own, for which D(x, 0) = x.
    """
    shifted = sigma - sigma_min
    norm = (sigma**2 + sigma_data**2).sqrt()
    c_skip = sigma_data**2 / (shifted**2 + sigma_data**2)
    c_out = shifted * sigma_data / norm
    return c_skip, c_out, 1 / norm


@dataclass(frozen=True)
class EDMDenoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, label(sigma)) for a network F.

    Args:
        network: called as `network(sample, label, class_labels=...)`, answering with a tensor in `.sample`.
        sigma_data: root mean square of the data.
        sigma_min: the level at which D is the identity.
        time_label: a key of `TIME_LABELS`.
    """

    network: Callable
    sigma_data: float
    sigma_min: float = 0.0
    time_label: str = "log_sigma"
    prediction: ClassVar[str] = "edm"

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W), noised to `sigma` (B,); class labels (B,) where the network takes them."""
        c_skip, c_out, c_in = (append_dims(c, x) for c in edm_scalings(sigma, self.sigma_data, self.sigma_min))
        label = TIME_LABELS[self.time_label].from_sigma(sigma, self.sigma_data)
        output = self.network(c_in * x, label, class_labels=class_labels).sample
        return c_skip * x + c_out * output.to(x.dtype)


@dataclass(frozen=True)
class TrajectoryDenoiser:
    """D(x, sigma) = G(x, sigma, sigma_min): the jumps of a consistency trajectory model as a denoiser.

    The network F has two times, t of its input and s to jump to. Under EDM's scalings, without a floor (Kim et al.
    2023, arXiv:2310.02279),

        g(x, t, s) = c_skip(t) x + c_out(t) F(c_in(t) x, label(t), label(s))
        G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)                                            (eq. 9)

    so that G(x, t, t) = x for any network; g(x, t, t) is the denoiser of the probability-flow ODE.

    Args:
        network: called as `network(sample, label, target_timestep=label to jump to, class_labels=...)`, answering with
            a tensor in `.sample`.
        sigma_data: root mean square of the data.
        sigma_min: the level that stands for clean data; above 0 for the label "log_sigma".
        time_label: a key of `TIME_LABELS`.
    """

    network: Callable
    sigma_data: float
    sigma_min: float = 0.002
    time_label: str = "log_sigma"
    prediction: ClassVar[str] = "edm"

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The jump of `x` (B, C, H, W) from `sigma` (B,) to sigma_min."""
        return self.jump(x, sigma, torch.full_like(sigma, self.sigma_min), class_labels)

    def jump(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """G(x, sigma, sigma_to) of `x` (B, C, H, W), both levels (B,), in the form where nothing cancels.

        It is (s t + sigma_data^2) / (t^2 + sigma_data^2) x + (t - s) sigma_data / sqrt(t^2 + sigma_data^2) F.
        """
        t, s, variance = sigma, sigma_to, self.sigma_data**2
        keep = (s * t + variance) / (t * t + variance)
        change = (t - s) * self.sigma_data / (t * t + variance).sqrt()
        return append_dims(keep, x) * x + append_dims(change, x) * self._output(x, t, s, class_labels)

    def denoise(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """g(x, sigma, sigma) of `x` (B, C, H, W) at `sigma` (B,), the estimate of the clean data."""
        c_skip, c_out, _ = (append_dims(c, x) for c in edm_scalings(sigma, self.sigma_data))
        return c_skip * x + c_out * self._output(x, sigma, sigma, class_labels)

    def _output(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, class_labels: Tensor | None) -> Tensor:
        """F(c_in(sigma) x, label(sigma), label(sigma_to)) in the dtype of `x`."""
        c_in = append_dims(edm_scalings(sigma, self.sigma_data)[2], x)
        label, target = (TIME_LABELS[self.time_label].from_sigma(s, self.sigma_data) for s in (sigma, sigma_to))
        return self.network(c_in * x, label, target_timestep=target, class_labels=class_labels).sample.to(x.dtype)


@dataclass(frozen=True)
class TrigFlowDenoiser:
    """D = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t) at the angle t = atan(sigma / sigma_data).

    F is the velocity over sigma_data of x_t = cos(t) x0 + sin(t) sigma_data noise (Lu & Song 2024, arXiv:2410.11081,
    section 3). It is EDM's preconditioning with the sign of the network turned; D(x, 0) = x.
    """

    network: Callable
    sigma_data: float
    time_label: ClassVar[str] = "angle"
    prediction: ClassVar[str] = "trigflow"

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W), noised to `sigma` (B,)."""
        process = TrigFlow(self.sigma_data)
        t, x_t = process.time(sigma), append_dims(process.alpha(sigma), x) * x
        output = self.network(x_t / self.sigma_data, t, class_labels=class_labels).sample.to(x.dtype)
        return to_denoised("trigflow", output, x_t, sigma, process)


@dataclass(frozen=True)
class FlowDenoiser:
    """D = x_t - t u(x_t, t) at the flow time t = sigma / (1 + sigma), for a network that predicts noise - x0.

    x_t = (1 - t) x0 + t noise: rectified flow, flow matching (Lipman et al. 2022, arXiv:2210.02747); D(x, 0) = x.
    """

    network: Callable
    sigma_data: float = 1.0  # of the data; the denoiser itself does not need it
    time_label: ClassVar[str] = "flow_time"
    prediction: ClassVar[str] = "flow"

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W), noised to `sigma` (B,)."""
        process = LinearFlow()
        t, x_t = process.time(sigma), append_dims(process.alpha(sigma), x) * x
        output = self.network(x_t, t, class_labels=class_labels).sample.to(x.dtype)
        return to_denoised("flow_prediction", output, x_t, sigma, process)


Denoiser = EDMDenoiser | TrajectoryDenoiser | TrigFlowDenoiser | FlowDenoiser
DENOISERS = {cls.prediction: cls for cls in (EDMDenoiser, TrigFlowDenoiser, FlowDenoiser)}


def trigflow_velocity(
    denoiser: Denoiser, x: Tensor, t: Tensor, sigma_data: float, class_labels: Tensor | None = None
) -> Tensor:
    """dx/dt of TrigFlow's probability-flow ODE by any denoiser, at `x` (B, ...) in TrigFlow's scale, t in (0, pi/2).

    From D = cos(t) x - sin(t) dx/dt. This wraps networks of other processes as TrigFlow's: the same point is
    x / cos(t) in VE, at sigma = sigma_data tan(t).
    """
    cos, sin = append_dims(t.cos(), x), append_dims(t.sin(), x)
    return (cos * x - denoiser(x / cos, sigma_data * t.tan(), class_labels)) / sin


def to_denoised(prediction_type: str, output: Tensor, x: Tensor, sigma: Tensor, interpolant: Interpolant) -> Tensor:
    """The estimate of the clean data from a network's output, for a process other than EDM's.

    Args:
        prediction_type: what the network predicts: "sample" (x0), "epsilon" (the noise), "v_prediction"
            (alpha noise - std x0, for alpha^2 + std^2 = 1), "flow_prediction" (noise - x0, for alpha + std = 1), or
            "trigflow" (the velocity over sigma_data: x0 = cos(t) x - sin(t) sigma_data F).
        output: the network's output (B, ...).
        x: the noisy sample (B, ...) in the interpolant's own scale.
        sigma: its noise-to-signal ratio (B,); finite for "epsilon", which says nothing of x0 where x is pure noise.
        interpolant: the forward process.

    Raises:
        ValueError: unknown prediction type.
    """
    alpha, std = append_dims(interpolant.alpha(sigma), x), append_dims(interpolant.std(sigma), x)
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (x - std * output) / alpha
    if prediction_type in ("v_prediction", "trigflow"):  # TrigFlow's std is sin(t) sigma_data
        return alpha * x - std * output
    if prediction_type == "flow_prediction":
        return x - std * output
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}.")


def from_denoised(
    prediction_type: str, denoised: Tensor, x: Tensor, sigma: Tensor, interpolant: Interpolant
) -> Tensor:
    """What a network must put out to mean `denoised`: the inverse of `to_denoised`, for sigma > 0."""
    alpha, std = append_dims(interpolant.alpha(sigma), x), append_dims(interpolant.std(sigma), x)
    if prediction_type == "sample":
        return denoised
    if prediction_type == "epsilon":
        return (x - alpha * denoised) / std
    if prediction_type in ("v_prediction", "trigflow"):
        return (alpha * x - denoised) / std
    if prediction_type == "flow_prediction":
        return (x - denoised) / std
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}.")
