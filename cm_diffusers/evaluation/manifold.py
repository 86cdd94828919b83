"""Precision, recall, density and coverage: samples judged by balls that reach from each one to its k-th neighbour.

A ball includes its border, as the equations have it. Distances are computed in float64 and by blocks, so that 50,000
samples against as many never make a matrix of 20 GB.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cm_diffusers.evaluation.checks import checked


BLOCK = 1 << 22  # distances at once: 32 MB


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2).

    Precision is the share of `made` in a ball of `real`, recall the share of `real` in a ball of `made`, both in
    [0, 1]; an outlier's ball is large, so they flatter. Both rise with the number of samples: compare at equal ones.

    Args:
        real, made: features (N, d) and (M, d).
        k: the radius of a sample's ball reaches to its k-th neighbour of its own set.

    Raises:
        ValueError: other shapes, non-finite features, or not more than k samples.
    """
    return neighbour_metrics(real, made, k, k)[:2]


def density_coverage(real: Tensor, made: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797, section 3).

    Density is the mean number of balls of `real` that a sample of `made` is in, over k: from 0 up, 1 expected for
    equal distributions. Coverage is the share of these balls with a sample of `made` in them, in [0, 1], 1 - 2^-k
    expected for equal distributions and numbers.

    Args and raises: as precision_recall.
    """
    return neighbour_metrics(real, made, k, k)[2:]


def neighbour_metrics(
    real: Tensor, made: Tensor, precision_k: int = 3, density_k: int = 5
) -> tuple[float, float, float, float]:
    """Precision and recall by `precision_k` neighbours, density and coverage by `density_k`, in one pass.

    Args and raises: as precision_recall.
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
    """Checked sets about the real mean, which leaves distances as they are and keeps their rounding errors small."""
    if min(ks) < 1:
        raise ValueError(f"k must be >= 1; got {min(ks)}.")
    real, made = checked(real, made, at_least=max(ks) + 1)
    centre = real.mean(0)
    return real - centre, made - centre


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a (n,) and their distances (n, M) to b, block by block."""
    for rows in torch.arange(len(a), device=a.device).split(max(1, BLOCK // len(b))):
        yield rows, torch.cdist(a[rows], b)


def _radii(features: Tensor, *ks: int) -> list[Tensor]:
    """Distances (N,) to the k-th neighbour, for each of `ks`."""
    nearest = []
    for rows, distances in _blocks(features, features):
        distances[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        nearest.append(distances.topk(max(ks), largest=False).values)
    nearest = torch.cat(nearest)
    return [nearest[:, k - 1] for k in ks]
