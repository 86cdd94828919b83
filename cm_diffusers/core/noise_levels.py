"""Distributions of the noise level in training."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from cm_diffusers.core.arrays import in_float64, on_device
from cm_diffusers.core.karras import karras_sigmas


def lognormal(normal: Tensor, mean: float, std: float) -> Tensor:
    """Noise levels with ln(sigma) ~ N(`mean`, `std`^2) (Karras et al. 2022, table 1).

    `normal` holds unit normal draws of any shape, which is that of the result.
    """
    return (mean + std * normal).exp()


def lognormal_bins(sigmas: Tensor, mean: float, std: float) -> Tensor:
    """iCT's discretised log-normal distribution of the index i of a pair (sigma_i, sigma_{i+1}).

    p(i) is proportional to erf((ln sigma_{i+1} - mean) / (sqrt(2) std)) - erf((ln sigma_i - mean) / (sqrt(2) std))
    (Song & Dhariwal 2023, arXiv:2310.14189, eq. 9). The result is float64 (n - 1,) and sums to 1.

    Args:
        sigmas: increasing levels (n,).
        mean: mean of ln(sigma).
        std: standard deviation of ln(sigma).
    """
    cumulative = torch.erf((sigmas.double().log() - mean) / (math.sqrt(2) * std))
    return cumulative.diff() / cumulative.diff().sum()


def uniform_bins(sigmas: Tensor) -> Tensor:
    """The uniform distribution of the index of a pair of `sigmas` (n,), float64 (n - 1,): that of CT and CD."""
    return torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1), dtype=torch.float64)


def linear_law(n: int) -> Tensor:
    """p(i) proportional to i + 1 for i in 0 ... `n` - 1, float64 (n,): CTM's distribution of the solver steps."""
    weights = torch.arange(1, n + 1, dtype=torch.float64)
    return weights / weights.sum()


def draw_bins(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Indices (B,) with the distribution `probabilities` (n,), from `uniform` draws (B,) in [0, 1)."""
    return _bins(probabilities.cumsum(0).to(in_float64(uniform).device), uniform).to(uniform.device)


def draw_levels(
    law: Callable[[Tensor], Tensor], n: int, sigma_min: float, sigma_max: float, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw neighbouring levels u < t of the Karras grid of `n` levels.

    Args:
        law: the distribution (n - 1,) of the index of u, as a function of the rising levels (n,). Grids are kept for
            each `law` object, because a copy to a GPU waits for all work in its queue.
        n: number of levels, at least 2.
        sigma_min, sigma_max: the lowest and the highest level.
        uniform: draws (B,) in [0, 1).

    Returns:
        u and t, float64 (B,) each, on the device of `uniform`, or on the CPU if that lacks float64.
    """
    sigmas, cumulative = (on_device(table, uniform.device) for table in _grid(law, n, sigma_min, sigma_max))
    bins = _bins(cumulative, uniform)
    return sigmas[bins], sigmas[bins + 1]


@lru_cache(maxsize=4)
def _grid(law: Callable[[Tensor], Tensor], n: int, sigma_min: float, sigma_max: float) -> tuple[Tensor, Tensor]:
    """The rising levels (n,), and the cumulative distribution (n - 1,) of the lower one of a pair."""
    sigmas = karras_sigmas(n, sigma_min, sigma_max).flip(0)
    return sigmas, law(sigmas).cumsum(0)


def _bins(cumulative: Tensor, uniform: Tensor) -> Tensor:
    return torch.searchsorted(cumulative, in_float64(uniform), right=True).clamp(max=len(cumulative) - 1)
