"""The noise-level grid of Karras et al. 2022 (arXiv:2206.00364)."""

import torch
from torch import Tensor

from cm_diffusers.core.arrays import Values


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """`n` levels from `sigma_max` down to `sigma_min`, float64 (n,); `rho` is as in `karras_sigma`."""
    return karras_sigma(torch.linspace(0, 1, n, dtype=torch.float64), sigma_min, sigma_max, rho)


def karras_sigma(
    ramp: Values, sigma_min: float | Tensor = 0.002, sigma_max: float | Tensor = 80.0, rho: float = 7.0
) -> Values:
    """The level at `ramp` in [0, 1], any shape: from `sigma_max` at 0 down to `sigma_min` at 1 (eq. 5).

    Both ends can be tensors that broadcast against `ramp`. A higher exponent `rho` puts more levels near `sigma_min`.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho  # eq. 5
