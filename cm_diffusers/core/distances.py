"""Distances between two batches (B, ...), one value per sample (B,)."""

import torch
from torch import Tensor


def l2(a: Tensor, b: Tensor) -> Tensor:
    """The squared norm |a - b|^2 of each sample of `a` and `b` (B, ...): (B,)."""
    return (a - b).flatten(1).square().sum(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c of each sample of `a` and `b` (B, ...): (B,).

    The norm is that of the whole sample (Song & Dhariwal 2023, arXiv:2310.14189, eq. 7). At `c` = 0 the distance is
    this norm, ECT's default; its gradient where a = b is 0.
    """
    if c == 0:
        return torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    squared = l2(a, b)
    return squared / ((squared + c**2).sqrt() + c)  # the same number, without cancellation near a = b


def ict_huber_c(dimensions: int) -> float:
    """c = 0.00054 sqrt(d), iCT's choice for samples of d = `dimensions` values."""
    return 0.00054 * dimensions**0.5
