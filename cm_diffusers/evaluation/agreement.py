"""Whether samples are of the classes that were asked for, as their nearest neighbours among real images have it."""

import torch
from torch import Tensor

from cm_diffusers.evaluation.checks import checked


BLOCK = 1 << 22  # distances at once: 32 MB


def label_agreement(real: Tensor, real_labels: Tensor, made: Tensor, made_labels: Tensor, k: int = 5) -> float:
    """The share of `made` whose k nearest of `real` are, most of them, of the class that was asked for, in [0, 1].

    This is the rule of nearest neighbours (Cover & Hart 1967, https://doi.org/10.1109/TIT.1967.1053964); of classes
    with as many neighbours it takes that of the nearest one. `labels_told_apart` says how much it can be trusted.

    Args:
        real: features (N, d) of real images.
        real_labels: their classes, int64 (N,), from 0 on.
        made: features (M, d) of samples.
        made_labels: the classes that were asked for, int64 (M,).
        k: number of neighbours.

    Raises:
        ValueError: other shapes, non-finite features, or fewer than k images of either.
    """
    real, made = checked(real, made, at_least=k)
    _check_labels("real_labels", real_labels, real)
    _check_labels("made_labels", made_labels, made)
    return _right(_nearest(real, made, k), real_labels, made_labels)


def labels_told_apart(real: Tensor, labels: Tensor, k: int = 5) -> float:
    """`label_agreement` of the real images themselves, each of which is no neighbour of its own, in [0, 1].

    Args and raises: as `label_agreement`; there must be more than k images.
    """
    real, _ = checked(real, real, at_least=k + 1)
    _check_labels("labels", labels, real)
    return _right(_nearest(real, real, k, among_themselves=True), labels, labels)


def _check_labels(name: str, labels: Tensor, features: Tensor) -> None:
    if labels.shape != (len(features),) or labels.is_floating_point():
        raise ValueError(
            f"{name} must be integers ({len(features)},), one per image, got {labels.dtype} {tuple(labels.shape)}."
        )


def _nearest(real: Tensor, made: Tensor, k: int, among_themselves: bool = False) -> Tensor:
    """The places (M, k) of the nearest of `real`, the nearest first."""
    places = []
    for rows in torch.arange(len(made), device=made.device).split(max(1, BLOCK // len(real))):
        distances = torch.cdist(made[rows], real)
        if among_themselves:
            distances[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        places.append(distances.topk(k, largest=False).indices)
    return torch.cat(places)


def _right(places: Tensor, labels: Tensor, asked: Tensor) -> float:
    """The share of rows of neighbours whose class is the one asked for."""
    k = places.shape[1]
    votes = labels.to(places.device)[places]
    # what the order adds stays below one vote
    weights = 1 + torch.arange(k, 0, -1, dtype=torch.float64, device=places.device) / (2 * k * k)
    count = int(max(labels.max(), asked.max())) + 1
    counts = torch.zeros(len(places), count, dtype=torch.float64, device=places.device)
    counts.scatter_add_(1, votes, weights.expand(len(places), k))
    return float((counts.argmax(1) == asked.to(places.device)).double().mean())
