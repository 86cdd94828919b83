"""Distributions of the noise level in training."""

import math

import torch
from torch import Tensor

from cm_diffusers.core.arrays import Table, in_float64


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
    """Indices (B,) with the distribution `probabilities` (n,), from `uniform` draws (B,) in [0, 1).

    The indices are where `probabilities` are.
    """
    places = in_float64(uniform).to(probabilities.device)
    return torch.searchsorted(probabilities.cumsum(0), places, right=True).clamp(max=len(probabilities) - 1)


class LevelPairs:
    """The pairs of neighbouring noise levels of a grid, and their law: the times of CT, CD and their relatives.

    Args:
        sigmas: increasing levels (n,), float64.
        law: the probabilities (n - 1,) of the pairs, float64; None for equal ones.
    """

    def __init__(self, sigmas: Tensor, law: Tensor | None = None):
        self._sigmas, self._law = Table(sigmas), Table(uniform_bins(sigmas) if law is None else law)

    def draw(self, uniform: Tensor) -> Tensor:
        """Indices (B,) of pairs, from `uniform` draws (B,) in [0, 1)."""
        return draw_bins(self._law.at(uniform.device), uniform)

    def levels(self, indices: Tensor, like: Tensor) -> Tensor:
        """The levels (B,) at `indices` (B,), in the dtype and on the device of `like`."""
        return self._sigmas.at(indices.device)[indices].to(like)

    def gaps(self, indices: Tensor, like: Tensor) -> Tensor:
        """The differences (B,) of the pairs at `indices` (B,), in the dtype and on the device of `like`."""
        sigmas = self._sigmas.at(indices.device)
        return (sigmas[indices + 1] - sigmas[indices]).to(like)
