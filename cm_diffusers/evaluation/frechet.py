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
    beside two halves of real data. Non-zero eigenvalues of C_a C_b are those of the symmetric R C_b R, R^2 = C_a,
    whose root is sounder, and at d = 2048 twice as fast, than the eigenvalues of the product.

    Raises:
        ValueError: other shapes, non-finite features, or no more samples than features, where a covariance is singular
            whatever the images are.
    """
    if torch.is_tensor(a) and torch.is_tensor(b):
        checked(a, b)
    a, b = (f if isinstance(f, Moments) else Moments(f) for f in (a, b))
    check_count(min(a.count, b.count), len(a.mean))
    root = _root(a.covariance)
    spectrum = torch.linalg.eigvalsh(root @ b.covariance @ root)
    traces = a.covariance.trace() + b.covariance.trace() - 2 * spectrum.clamp(min=0).sqrt().sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + traces))


def check_count(count: int, dims: int) -> None:
    """Raise ValueError if `count` samples are too few for a covariance of `dims` features."""
    if count <= dims:
        raise ValueError(
            f"{count} images are too few for the covariance of {dims} features: at least {dims + 1} are needed, and"
            " several times as many for a distance that says something. Use more images, or an extractor of fewer"
            " features."
        )


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance (d, d), checked by squaring it."""
    values, vectors = torch.linalg.eigh(matrix)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    residual = (root @ root - matrix).norm() / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    if not residual < 1e-8:
        raise ValueError(f"the square root of a covariance of {len(matrix)} features failed: residual {residual:.1e}.")
    return root
