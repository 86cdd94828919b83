"""The Fréchet distance of two sets of features (Heusel et al. 2017, arXiv:1706.08500, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from cm_diffusers.evaluation.checks import checked


class Moments:
    """Mean (d,) and covariance (d, d) of features that come in batches, in float64.

    Deviations from the mean so far are summed (Chan, Golub, LeVeque 1983), so that nothing cancels.
    """

    def __init__(self, features: Tensor | None = None):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0
        if features is not None:
            self.add(features)

    def add(self, features: Tensor) -> None:
        """Take in features (B, d). Raises ValueError if they are not finite."""
        (features,) = checked(features, at_least=1)
        total = self.count + len(features)
        mean = features.mean(0)
        centred, shift = features - mean, mean - self.mean
        self.scatter = self.scatter + centred.T @ centred + shift.outer(shift) * (self.count * len(features) / total)
        self.mean = self.mean + shift * (len(features) / total)
        self.count = total

    def to(self, device: torch.device | str) -> Moments:
        """The same on `device`."""
        moved = Moments()
        moved.count, moved.mean, moved.scatter = self.count, self.mean.to(device), self.scatter.to(device)
        return moved

    @property
    def covariance(self) -> Tensor:
        return self.scatter / (self.count - 1)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, d), fitted by Gaussians in float64.

    It is at least 0. It is biased upwards for few samples, by about a constant over N: compare at equal numbers, and
    beside two halves of real data. With C = F F^T, the trace of the root is the sum of the singular values of
    F_a^T F_b, which loses no digits where features are 0 for all images and covariances singular.

    Raises:
        ValueError: other shapes, non-finite features, or no more samples than features, where a covariance is singular
            whatever the images are.
    """
    a, b = (f if isinstance(f, Moments) else Moments(f) for f in (a, b))
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features must have the shapes (N, d) and (M, d); got d = {len(a.mean)} and {len(b.mean)}.")
    check_count(min(a.count, b.count), len(a.mean))
    root_trace = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    return max(0.0, float((a.mean - b.mean).square().sum() + traces))


def check_count(count: int, dims: int) -> None:
    """Raise ValueError if `count` samples are too few for a covariance of `dims` features."""
    if count <= dims:
        raise ValueError(
            f"{count} images are too few for the covariance of {dims} features: at least {dims + 1} are needed, and"
            " several times as many for a distance that says something. Use more images, or an extractor of fewer"
            " features."
        )


def _factor(covariance: Tensor) -> Tensor:
    """F (d, d) with F F^T the covariance, which is checked."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps  # what rounding makes of 0 has a large root
    factor = vectors * torch.where(values > noise, values, 0).sqrt()
    error, size = (factor @ factor.T - covariance).norm(), covariance.norm()
    if not error <= 1e-8 * size:
        raise ValueError(
            f"no square root of the covariance of {len(values)} features was found: error {error / size}."
        )
    return factor
