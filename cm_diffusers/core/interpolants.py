"""Gaussian interpolants x_t = alpha(t) x0 + std(t) noise, indexed by sigma = std / alpha.

Every Gaussian forward process is the same process up to a change of time and a rescaling, so the library speaks one
coordinate: the noise-to-signal ratio sigma, which is EDM's noise level (Karras et al. 2022, arXiv:2206.00364).
"""

from abc import ABC, abstractmethod

from torch import Tensor


def append_dims(values: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample `values` (B,) so that they broadcast against `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Interpolant(ABC):
    """A forward process. `sigma` is the noise-to-signal ratio (B,), `time` the process' own clock (B,)."""

    @abstractmethod
    def alpha(self, sigma: Tensor) -> Tensor:
        """The factor of the data, in (0, 1]."""

    @abstractmethod
    def std(self, sigma: Tensor) -> Tensor:
        """The standard deviation of the noise."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """sigma -> the process' own time."""

    @abstractmethod
    def sigma(self, time: Tensor) -> Tensor:
        """The process' own time -> sigma."""

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t for data `x0` and unit normal `noise` (B, ...) at `sigma` (B,)."""
        return append_dims(self.alpha(sigma), x0) * x0 + append_dims(self.std(sigma), x0) * noise

    def jump(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Move `x` from `sigma` > 0 to `sigma_next` along the line through `denoised`; all levels have shape (B,).

        G = (std_s / std_t) x + (alpha_s - alpha_t std_s / std_t) D: the DDIM step, and CTM's outer parameterisation
        (Kim et al. 2023, arXiv:2310.02279, eq. 9). G = x where sigma_next = sigma, whatever `denoised` is.
        """
        ratio = self.std(sigma_next) / self.std(sigma)
        keep = self.alpha(sigma_next) - self.alpha(sigma) * ratio
        return append_dims(ratio, x) * x + append_dims(keep, x) * denoised


class VE(Interpolant):
    """Variance exploding, x = x0 + sigma noise: the process of EDM and of the consistency models; time is sigma."""

    def alpha(self, sigma: Tensor) -> Tensor:
        return sigma.new_ones(()).expand(sigma.shape)

    def std(self, sigma: Tensor) -> Tensor:
        return sigma

    def time(self, sigma: Tensor) -> Tensor:
        return sigma

    def sigma(self, time: Tensor) -> Tensor:
        return time
