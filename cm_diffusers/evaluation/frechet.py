"""The Fréchet distance of two sets of features (Heusel et al. 2017, arXiv:1706.08500)."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, d), fitted by Gaussians in float64.

    It is biased upwards for few samples: compare at equal numbers, and beside two halves of real data.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must have the shapes (N, d) and (M, d), N and M > 1; got {a.shape} and {b.shape}.")
    (mean_a, cov_a), (mean_b, cov_b) = ((f.mean(0), f.T.cov()) for f in (a.double(), b.double()))
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace)
