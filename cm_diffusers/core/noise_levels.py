"""Laws of the training noise level."""

import math

import torch
from torch import Tensor

from cm_diffusers.core.arrays import in_float64


def lognormal(normal: Tensor, mean: float, std: float) -> Tensor:
    """sigma with ln(sigma) ~ N(mean, std^2), from unit `normal` draws (Karras et al. 2022, table 1)."""
    return (mean + std * normal).exp()


def lognormal_bins(sigmas: Tensor, mean: float, std: float) -> Tensor:
    """iCT's discretised log-normal law of the index i of a pair (sigma_i, sigma_{i+1}), float64 (n - 1,), sum 1.

    p(i) is proportional to erf((ln sigma_{i+1} - mean) / (sqrt(2) std)) - erf((ln sigma_i - mean) / (sqrt(2) std))
    for rising `sigmas` (n,) (Song & Dhariwal 2023, arXiv:2310.14189, eq. 9).
    """
    cumulative = torch.erf((sigmas.double().log() - mean) / (math.sqrt(2) * std))
    return cumulative.diff() / cumulative.diff().sum()


def uniform_bins(sigmas: Tensor) -> Tensor:
    """The uniform law of the index of a pair, float64 (n - 1,): that of CT and CD."""
    return torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1), dtype=torch.float64)


def linear_law(n: int) -> Tensor:
    """p(i) proportional to i + 1 for i in 0 ... n - 1, float64 (n,): CTM's law of the number of solver steps."""
    weights = torch.arange(1, n + 1, dtype=torch.float64)
    return weights / weights.sum()


def draw_bins(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Indices (B,) with the given law, from `uniform` draws (B,) in [0, 1)."""
    places = in_float64(uniform)
    cumulative = probabilities.cumsum(0).to(places.device)
    bins = torch.searchsorted(cumulative, places, right=True).clamp(max=len(probabilities) - 1)
    return bins.to(uniform.device)
