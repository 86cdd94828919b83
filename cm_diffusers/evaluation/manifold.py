"""Precision, recall, density and coverage, from balls that reach from each sample to its k-th neighbour.

A ball includes its border, as in the papers' equations. Distances are computed in float64 and in blocks, so that
50,000 samples against 50,000 never need a matrix of 20 GB.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cm_diffusers.evaluation.checks import checked


BLOCK = 1 << 22  # distances per block: 32 MB


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2).

    Precision is the share of `made` inside a ball of `real`, recall the share of `real` inside a ball of `made`, both
    in [0, 1]. Outliers have large balls, which makes both too high. Both rise with the number of samples: compare at
    equal numbers.

    Args:
        real, made: features of the real images, (N, d), and of the samples, (M, d).
        k: a ball reaches to the k-th neighbour within the same set.

    Raises:
        ValueError: other shapes, non-finite features, or not more than k samples.
    """
    return neighbour_metrics(real, made, k, k)[:2]


def density_coverage(real: Tensor, made: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797, section 3).

    Density is the mean number of balls of `real` around a sample of `made`, divided by k. It is at least 0, and about
    1 for equal distributions. Coverage is the share of the balls of `real` that contain a sample of `made`. It lies
    in [0, 1], and is about 1 - 2^-k for equal distributions and numbers.

    Args:
        real, made: features of the real images, (N, d), and of the samples, (M, d).
        k: a ball reaches to the k-th neighbour among `real`.

    Raises:
        ValueError: other shapes, non-finite features, or not more than k samples.
    """
    return neighbour_metrics(real, made, k, k)[2:]


def neighbour_metrics(
    real: Tensor, made: Tensor, precision_k: int = 3, density_k: int = 5
) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage in one pass; see `precision_recall` and `density_coverage`.

    Args:
        real, made: features of the real images, (N, d), and of the samples, (M, d), `made` on the device of `real`.
        precision_k: k of precision and recall.
        density_k: k of density and coverage.

    Raises:
        ValueError: other shapes, non-finite features, or not more than k samples.
    """
    real, made = _centred(real, made, precision_k, density_k)
    (near, far), (reach,) = _radii(real, precision_k, density_k), _radii(made, precision_k)
    precise, recalled, inside = torch.zeros(len(made), dtype=torch.bool, device=made.device), [], []
    for rows, distances in _blocks(real, made):
        precise |= (distances <= near[rows, None]).any(0)
        recalled.append((distances <= reach).any(1))
        inside.append((distances <= far[rows, None]).sum(1, dtype=torch.int32))
    precision, recall = precise.double().mean(), torch.cat(recalled).double().mean()
    inside = torch.cat(inside).double()
    density, coverage = inside.sum() / (density_k * len(made)), (inside > 0).double().mean()
    return float(precision), float(recall), float(density), float(coverage)


def _centred(real: Tensor, made: Tensor, *ks: int) -> tuple[Tensor, Tensor]:
    """Check the sets and subtract the real mean, which keeps the rounding errors of distances small."""
    if min(ks) < 1:
        raise ValueError(f"k must be >= 1; got {min(ks)}.")
    real, made = checked(real, made, at_least=max(ks) + 1)
    centre = real.mean(0)
    return real - centre, made - centre


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the indices (n,) of a block of rows of `a`, and the distances (n, M) of these rows to `b`."""
    for rows in torch.arange(len(a), device=a.device).split(max(1, BLOCK // len(b))):
        yield rows, torch.cdist(a[rows], b)


def _radii(features: Tensor, *ks: int) -> list[Tensor]:
    """Distances (N,) to the k-th neighbour, for each k in `ks`."""
    nearest = []
    for rows, distances in _blocks(features, features):
        distances[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        nearest.append(distances.topk(max(ks), largest=False).values)
    nearest = torch.cat(nearest)
    return [nearest[:, k - 1] for k in ks]
