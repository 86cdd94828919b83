"""Gaussian interpolants x_t = alpha(t) x0 + std(t) noise, indexed by sigma = std / alpha.

Every Gaussian forward process is the same process up to a change of time and a rescaling. The library therefore uses
one coordinate: the noise-to-signal ratio sigma, which is EDM's noise level (Karras et al. 2022, arXiv:2206.00364). It
is infinite where a process reaches pure noise: flow time 1, angle pi/2, zero terminal SNR.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cm_diffusers.core.arrays import append_dims, in_float64, on_device
from cm_diffusers.core.parameterisation import input_norm
from cm_diffusers.core.time_labels import flow_time_up_to_infinity, sigma_of_angle, sigma_of_flow_time, vp_angles


class Interpolant(ABC):
    """A forward process. `sigma` is the noise-to-signal ratio (B,), `time` the process's own time (B,)."""

    sigma_max: float = math.inf  # the highest level that the process reaches
    scale: float = 1.0  # the network's input is x_t / scale

    @abstractmethod
    def alpha(self, sigma: Tensor) -> Tensor:
        """The factor of the data at `sigma` (B,), in [0, 1]."""

    @abstractmethod
    def std(self, sigma: Tensor) -> Tensor:
        """The standard deviation of the noise at `sigma` (B,)."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The process's own time at `sigma` (B,)."""

    @abstractmethod
    def sigma(self, time: Tensor) -> Tensor:
        """The noise-to-signal ratio at the process's own `time` (B,)."""

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t from data `x0` and unit normal `noise`, both (B, ...), at `sigma` (B,)."""
        return append_dims(self.alpha(sigma), x0) * x0 + append_dims(self.std(sigma), x0) * noise

    def jump(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Move `x` (B, ...) from `sigma` > 0 to `sigma_next`, both (B,), along the line through `denoised`.

        G = (std_s / std_t) x + (alpha_s - alpha_t std_s / std_t) D: the DDIM step, and CTM's outer parameterisation
        (Kim et al. 2023, arXiv:2310.02279, eq. 9). Where sigma_next = sigma, G = x for any `denoised`.
        """
        ratio = self.std(sigma_next) / self.std(sigma)
        keep = self.alpha(sigma_next) - self.alpha(sigma) * ratio
        return append_dims(ratio, x) * x + append_dims(keep, x) * denoised  # eq. 9


class VE(Interpolant):
    """Variance exploding, x = x0 + sigma noise: the process of EDM and of consistency models. Its time is sigma."""

    def alpha(self, sigma: Tensor) -> Tensor:
        return sigma.new_ones(()).expand(sigma.shape)

    def std(self, sigma: Tensor) -> Tensor:
        return sigma

    def time(self, sigma: Tensor) -> Tensor:
        return sigma

    def sigma(self, time: Tensor) -> Tensor:
        return time


class TrigFlow(Interpolant):
    """x = cos(t) x0 + sin(t) sigma_data noise, t in [0, pi/2] (Lu & Song 2024, arXiv:2410.11081, section 3).

    `sigma_data` is the root mean square of the data.
    """

    def __init__(self, sigma_data: float):
        self.sigma_data = self.scale = sigma_data

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + (sigma / self.sigma_data) ** 2).sqrt()

    def std(self, sigma: Tensor) -> Tensor:
        return self.sigma_data / (1 + (self.sigma_data / sigma) ** 2).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_data).atan()

    def sigma(self, time: Tensor) -> Tensor:
        return sigma_of_angle(time, self.sigma_data)


class LinearFlow(Interpolant):
    """x = (1 - t) x0 + t noise, t in [0, 1]: rectified flow, flow matching (Lipman et al. 2022, arXiv:2210.02747)."""

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 / input_norm("flow", sigma)

    def std(self, sigma: Tensor) -> Tensor:
        return flow_time_up_to_infinity(sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return self.std(sigma)

    def sigma(self, time: Tensor) -> Tensor:
        return sigma_of_flow_time(time)


class VP(Interpolant):
    """x = sqrt(abar) x0 + sqrt(1 - abar) noise: DDPM (Ho et al. 2020, arXiv:2006.11239).

    Args:
        alphas_cumprod: abar (N,) at the integer times 0, 1, ..., N - 1, decreasing; the last can be 0 (zero terminal
            SNR). Between integers the angle atan(sigma) is interpolated; outside the table its ends hold.

    Raises:
        ValueError: `alphas_cumprod` is not a vector of at least 2 values that strictly decrease within [0, 1].
    """

    def __init__(self, alphas_cumprod: Tensor):
        abar = alphas_cumprod.double()
        if abar.ndim != 1 or len(abar) < 2 or (abar.diff() >= 0).any() or abar[0] > 1 or abar[-1] < 0:
            raise ValueError(
                "alphas_cumprod must be a vector of at least 2 values that strictly decrease within [0, 1]."
            )
        self.angles = vp_angles(abar)
        self.sigma_max = self.sigma(torch.tensor(len(abar) - 1.0, dtype=torch.float64)).item()

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 / input_norm("epsilon", sigma)

    def std(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + 1 / sigma**2).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        # `time_labels.vp_time` for batches on any device; the two differ in the last bit of float64
        angle = in_float64(sigma).atan()
        angles = on_device(self.angles, angle.device)
        left = (torch.searchsorted(angles, angle, right=True) - 1).clamp(0, len(angles) - 2)
        share = (angle - angles[left]) / (angles[left + 1] - angles[left])
        return (left + share).clamp(0, len(angles) - 1).to(sigma)

    def sigma(self, time: Tensor) -> Tensor:
        last = len(self.angles) - 1
        place = in_float64(time).clamp(0, last)
        angles = on_device(self.angles, place.device)
        left = place.long().clamp(max=last - 1)
        angle = angles[left] + (place - left) * (angles[left + 1] - angles[left])
        return sigma_of_angle(angle).to(time)
