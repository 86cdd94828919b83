"""Predictions of networks for x = x0 + sigma noise, and the scale of their input: a table and its formulas.

    prediction      network input                network output (norm is that of `input_norm`)
    edm             x / norm                     F under EDM's scalings: D = c_skip x + c_out F
    trigflow        x / norm                     -F of edm, the velocity over sigma_data of TrigFlow
    epsilon         x / norm, alpha = 1 / norm   the noise
    v_prediction    x / norm                     alpha noise - std x0, std = sigma / norm
    flow            x / norm, 1 - t = 1 / norm   noise - x0
    sample          x / norm                     x0, which is not the identity at sigma = 0

The estimate D of x0 is a sum of x and the output, with factors that only depend on sigma. The order of operations
changes the last bit, and the numbers of saved models and of training are kept to the bit. This is why there are
several forms:

- `read_out_on_process` for a network's own process,
- `jump_scalings` for jumps from level to level,
- `slope_scalings` for slopes,
- `read_out_scalings` and `read_out_of_input` for samplers.
"""

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.core.arrays import Values
from cm_diffusers.core.time_labels import TIME_LABELS, flow_time, sigma_of_flow_time, sigma_of_vp_time, vp_time


# predictions of networks that can jump: D is the identity at sigma = 0, or at a floor
JUMP_PREDICTIONS = ("edm", "flow", "epsilon", "v_prediction")


def spread_of(prediction: str, sigma_data: float) -> float:
    """The assumed standard deviation of the data: `sigma_data` for the `prediction` "edm" or "trigflow", else 1."""
    return sigma_data if prediction in ("edm", "trigflow") else 1.0


def input_norm(prediction: str, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The divisor of x for the network's input: 1 + sigma for "flow", else sqrt(sigma^2 + spread^2).

    1 / norm is EDM's c_in (Karras et al. 2022, table 1), the alpha of VP (Ho et al. 2020), 1 - t of linear flow.

    Args:
        prediction: what the network predicts.
        sigma: any shape.
        sigma_data: the spread for "edm" and "trigflow"; others have 1.
    """
    if prediction == "flow":
        return 1 + sigma
    return (sigma**2 + spread_of(prediction, sigma_data) ** 2).sqrt()


def edm_scalings(sigma: Tensor, sigma_data: float, sigma_min: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in at `sigma`, any shape (Karras et al. 2022, table 1).

    With a floor `sigma_min` > 0 they are those of consistency models (Song et al. 2023, arXiv:2303.01469, app. C), for
    which D(x, sigma_min) = x. With 0 they are EDM's own, for which D(x, 0) = x. `sigma_data` is the root mean square
    of the data.
    """
    shifted = sigma - sigma_min
    norm = input_norm("edm", sigma, sigma_data)
    c_skip = sigma_data**2 / (shifted**2 + sigma_data**2)
    c_out = shifted * sigma_data / norm
    return c_skip, c_out, 1 / norm


def read_out_scalings(
    prediction: str, sigma: Tensor, sigma_data: float = 1.0, sigma_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The factors keep of x = x0 + sigma noise and gain of the network's output F: D(x, sigma) = keep x + gain F.

    For "edm" this D equals that of diffusers' `CMStochasticIterativeScheduler` to the bit.

    Args:
        prediction: one of `JUMP_PREDICTIONS`, or "sample".
        sigma: any shape.
        sigma_data: root mean square of the data, for "edm".
        sigma_min: the floor of "edm", where D(x, sigma_min) = x.
    """
    if prediction == "sample":
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    if prediction == "epsilon":
        return torch.ones_like(sigma), -sigma
    if prediction == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / input_norm(prediction, sigma)
    if prediction == "flow":
        norm = input_norm(prediction, sigma)
        return 1 / norm, -sigma / norm
    c_skip, c_out, _ = edm_scalings(sigma, sigma_data, sigma_min)
    return c_skip, c_out


def read_out_of_input(prediction: str, output: Tensor, network_input: Tensor, sigma: Tensor) -> Tensor:
    """D for "flow" and "v_prediction" from x / norm: the form of `DenoisingPipeline`.

    It differs from `read_out_scalings` in the last bit, on which the images of saved diffusion models depend.

    Args:
        prediction: "flow" or "v_prediction".
        output: the network's output (B, ...).
        network_input: x / norm (B, ...).
        sigma: a shape that broadcasts against `output`.
    """
    norm = input_norm(prediction, sigma)
    return (network_input if prediction == "flow" else network_input / norm) - sigma / norm * output


def read_out_on_process(
    prediction: str, output: Tensor, x: Tensor, alpha: Tensor | float, std: Tensor | float
) -> Tensor:
    """The estimate of x0 from a network's output, for x = alpha x0 + std noise in the scale of its own process.

    It also holds where x is pure noise (alpha = 0), except for "epsilon", which does not determine x0 there.

    Args:
        prediction: "sample", "epsilon", "v_prediction", "flow", or "trigflow", whose std is sin(t) sigma_data.
        output, x: (B, ...).
        alpha, std: numbers, or tensors that broadcast against `x`.
    """
    if prediction == "sample":
        return output
    if prediction == "epsilon":
        return (x - std * output) / alpha
    if prediction == "flow":
        return x - std * output
    return alpha * x - std * output


def jump_scalings(prediction: str, sigma: Tensor, sigma_to: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The factors of x and of the network's output F in a jump G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s).

    g is the clean sample that F means: for "edm" c_skip(t) x + c_out(t) F without a floor (Kim et al. 2023,
    arXiv:2310.02279, eq. 9). In this form nothing cancels for any t and s, including 0, and s = t gives 1 and 0.

    Args:
        prediction: one of `JUMP_PREDICTIONS`; x is x0 + sigma noise for all of them.
        sigma, sigma_to: t and s, any shape.
        sigma_data: root mean square of the data, for "edm".
    """
    t, s = sigma, sigma_to
    if prediction == "flow":
        return (1 + s) / (1 + t), (s - t) / (1 + t)
    if prediction == "epsilon":
        return torch.ones_like(t), s - t
    spread, sign = spread_of(prediction, sigma_data), -1 if prediction == "v_prediction" else 1
    norm = t * t + spread**2
    return (s * t + spread**2) / norm, sign * (t - s) * spread / norm.sqrt()


def slope_scalings(prediction: str, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The pull and the gain in dx / dsigma = (x - g) / sigma = pull x - gain F, of the probability-flow ODE.

    A jump is linear in s: G = x + (s - t) (pull x - gain F). Unlike `jump_scalings` this form cancels for large t and
    small s, so it needs float64.

    Args:
        prediction: one of `JUMP_PREDICTIONS`.
        sigma: t, any shape; can be 0.
        sigma_data: root mean square of the data, for "edm".
    """
    if prediction == "epsilon":
        return torch.zeros_like(sigma), -torch.ones_like(sigma)
    norm = input_norm(prediction, sigma, sigma_data)
    if prediction == "flow":
        return 1 / norm, -1 / norm
    gain = spread_of(prediction, sigma_data) / norm
    return sigma / norm**2, -gain if prediction == "v_prediction" else gain


class NetworkInput:
    """The input of a network for x0 + sigma noise: the sample in the network's scale, and the level as its time.

    Args:
        prediction: a key of `LABELS_OF_PREDICTION`.
        time_label: one of the labels of this prediction.
        sigma_data: root mean square of the data, for "edm" and "trigflow".
        time_scale: factor of the label "flow_time".
        angles: the table (N,) from `vp_angles`, as an array, for the label "timestep"; otherwise None.
    """

    def __init__(
        self, prediction: str, time_label: str, sigma_data: float, time_scale: float, angles: np.ndarray | None
    ):
        self.prediction, self.time_label = prediction, time_label
        self.sigma_data, self.time_scale, self.angles = sigma_data, time_scale, angles

    def label(self, sigma: Values) -> Values:
        """The network's time input at `sigma`, any shape."""
        if self.time_label == "flow_time":
            return flow_time(sigma, self.time_scale)
        if self.time_label == "timestep":
            return vp_time(sigma, self._table)
        return TIME_LABELS[self.time_label].from_sigma(sigma, self.sigma_data)

    @property
    def _table(self) -> np.ndarray:
        assert self.angles is not None
        return self.angles

    def sigma(self, label: np.ndarray) -> np.ndarray:
        """The noise level with the time input `label`, any shape."""
        if self.time_label == "flow_time":
            with np.errstate(divide="ignore"):  # infinite where the process is pure noise
                return sigma_of_flow_time(label, self.time_scale)
        if self.time_label == "timestep":
            return sigma_of_vp_time(label, self._table)
        return TIME_LABELS[self.time_label].to_sigma(label, self.sigma_data)

    def norm(self, sigma: Tensor) -> Tensor:
        """The divisor of a sample at `sigma`, any shape; see `input_norm`."""
        return input_norm(self.prediction, sigma, self.sigma_data)
