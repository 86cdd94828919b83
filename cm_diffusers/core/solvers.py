"""Steps in VE of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, and of the reverse SDE.

Line numbers in comments are those of algorithm 1 of Karras et al. 2022 (arXiv:2206.00364). Pipelines use only
`heun_end`, because schedulers make the first half of their steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cm_diffusers.core.arrays import append_dims


BoundDenoiser = Callable[[Tensor, Tensor], Tensor]  # D(x, sigma) with a fixed condition


def ode_slope(denoise: BoundDenoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """The slope (x - D(x, sigma)) / sigma at `x` (B, ...) and `sigma` > 0 (B,), for D = `denoise`."""
    return (x - denoise(x, sigma)) / append_dims(sigma, x)  # lines 4 and 7


def euler_step(denoise: BoundDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One first-order step of `x` (B, ...) from `sigma` to `sigma_next`, both (B,), for D = `denoise`."""
    return x + append_dims(sigma_next - sigma, x) * ode_slope(denoise, x, sigma)  # line 5


def heun_end(x: Tensor, step: Tensor | float, slope: Tensor, slope_next: Tensor) -> Tensor:
    """The end of Heun's step of length `step` in sigma from `x` (B, ...).

    `slope` is the slope at `x`, and `slope_next` the slope at the end of Euler's step, both (B, ...).
    """
    return x + step * (slope + slope_next) / 2  # line 8


def heun_step(denoise: BoundDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One second-order step of `x` (B, ...) from `sigma` to `sigma_next`, both (B,), for D = `denoise`.

    Karras et al. 2022, algorithm 1. It is Euler's step where `sigma_next` is 0, which has no slope.
    """
    slope = ode_slope(denoise, x, sigma)
    step = append_dims(sigma_next - sigma, x)
    slope_next = ode_slope(denoise, x + step * slope, sigma_next)
    slope_next = torch.where(append_dims(sigma_next > 0, x), slope_next, slope)
    return heun_end(x, step, slope, slope_next)


def reverse_sde_step(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """One Euler-Maruyama step of dx = 2 (x - D) / sigma dsigma + sqrt(2 sigma) dW down to a lower level.

    Along this SDE D(x, sigma) is a martingale if D is exact (Daras et al. 2023, arXiv:2302.09057).

    Args:
        denoised: D(x, sigma) (B, ...).
        x: the point (B, ...) at `sigma`.
        sigma: the current level (B,), above 0.
        sigma_next: the next level (B,), at most `sigma`.
        noise: unit normal numbers (B, ...).
    """
    share, spread = ((sigma_next - sigma) / sigma).to(x), (2 * sigma * (sigma - sigma_next)).sqrt().to(x)
    return x + 2 * append_dims(share, x) * (x - denoised) + append_dims(spread, x) * noise
