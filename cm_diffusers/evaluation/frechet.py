"""The Fréchet distance of two sets of features (Heusel et al. 2017, arXiv:1706.08500, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from cm_diffusers.evaluation.checks import checked


class Moments:
    """Mean (d,) and covariance (d, d) of features that come in batches, in float64.

    Deviations from the running mean are summed (Chan, Golub, LeVeque 1983), which avoids cancellation.

    Args:
        features: the first batch (B, d), if any.
    """

    def __init__(self, features: Tensor | None = None):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0
        if features is not None:
            self.add(features)

    def add(self, features: Tensor) -> None:
        """Update the moments with `features` (B, d).

        Raises:
            ValueError: other shapes, or non-finite features.
        """
        (features,) = checked(features, at_least=1)
        total = self.count + len(features)
        mean = features.mean(0)
        centred, shift = features - mean, mean - self.mean
        self.scatter = self.scatter + centred.T @ centred + shift.outer(shift) * (self.count * len(features) / total)
        self.mean = self.mean + shift * (len(features) / total)
        self.count = total

    def to(self, device: torch.device | str) -> Moments:
        """A copy of the moments on `device`."""
        moved = Moments()
        moved.count, moved.mean, moved.scatter = self.count, self.mean.to(device), self.scatter.to(device)
        return moved

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (d, d) of the features so far, float64."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with means m and covariances C of two sets of features.

    The distance is at least 0. For few samples it is biased upwards, by about a constant over N. Compare at equal
    numbers of samples, and with the distance between two halves of the real data.

    With C = F F^T, the trace of the root is the sum of the singular values of F_a^T F_b. This loses no digits if some
    features are 0 for all images and covariances are therefore singular.

    Args:
        a, b: features (N, d) and (M, d), or the `Moments` of `a` and `b`; float64 inside.

    Raises:
        ValueError: other shapes, non-finite features, or N or M at most d, which makes a covariance singular for any
            images.
    """
    a, b = (f if isinstance(f, Moments) else Moments(f) for f in (a, b))
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features must have the shapes (N, d) and (M, d); got d = {len(a.mean)} and {len(b.mean)}.")
    check_count(min(a.count, b.count), len(a.mean))
    root_trace = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    return max(0.0, float((a.mean - b.mean).square().sum() + traces))


def check_count(count: int, dims: int) -> None:
    """Check that `count` samples suffice for a covariance of `dims` features.

    Raises:
        ValueError: `count` is at most `dims`.
    """
    if count <= dims:
        raise ValueError(
            f"{count} images are too few for the covariance of {dims} features: at least {dims + 1} are needed, and"
            " several times as many for a meaningful distance. Use more images, or an extractor with fewer features."
        )


def _factor(covariance: Tensor) -> Tensor:
    """A checked factor F (d, d) with F F^T = `covariance`."""
    values, vectors = torch.linalg.eigh(covariance)
    # eigenvalues below this are rounding errors of 0, whose roots would be large
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor = vectors * torch.where(values > noise, values, 0).sqrt()
    error, size = (factor @ factor.T - covariance).norm(), covariance.norm()
    if not error <= 1e-8 * size:
        raise ValueError(
            f"no square root of the covariance of {len(values)} features was found (relative error {error / size})."
        )
    return factor
