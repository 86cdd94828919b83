"""Agreement of samples with their requested classes, judged by their nearest neighbours among real images."""

import torch
from torch import Tensor

from cm_diffusers.evaluation.checks import checked


BLOCK = 1 << 22  # distances at once: 32 MB


def label_agreement(real: Tensor, real_labels: Tensor, made: Tensor, made_labels: Tensor, k: int = 5) -> float:
    """Share of samples that the k-nearest-neighbour rule assigns to their requested class, in [0, 1].

    The rule (Cover & Hart 1967, https://doi.org/10.1109/TIT.1967.1053964) takes the most frequent class among the k
    nearest real images. Of equally frequent classes it takes the one with the smaller sum of ranks.
    `labels_told_apart` measures the accuracy of the rule.

    Args:
        real: features (N, d) of real images.
        real_labels: classes of the real images, int64 (N,), from 0 on.
        made: features (M, d) of samples.
        made_labels: requested classes of the samples, int64 (M,).
        k: number of neighbours.

    Raises:
        ValueError: other shapes, non-finite features, or fewer than k images in either set.
    """
    real, made = checked(real, made, at_least=k)
    _check_labels("real_labels", real_labels, real)
    _check_labels("made_labels", made_labels, made)
    return _right(_nearest(real, made, k), real_labels, made_labels)


def labels_told_apart(real: Tensor, labels: Tensor, k: int = 5) -> float:
    """Accuracy of the k-nearest-neighbour rule on the real images, in [0, 1]; no image is its own neighbour.

    Args:
        real: features (N, d) of real images.
        labels: classes of the real images, int64 (N,), from 0 on.
        k: number of neighbours.

    Raises:
        ValueError: other shapes, non-finite features, or not more than k images.
    """
    real, _ = checked(real, real, at_least=k + 1)
    _check_labels("labels", labels, real)
    return _right(_nearest(real, real, k, among_themselves=True), labels, labels)


def _check_labels(name: str, labels: Tensor, features: Tensor) -> None:
    if labels.shape != (len(features),) or labels.is_floating_point():
        raise ValueError(
            f"{name} must be integers ({len(features)},), one per image; got {labels.dtype} {tuple(labels.shape)}."
        )


def _nearest(real: Tensor, made: Tensor, k: int, among_themselves: bool = False) -> Tensor:
    """Indices (M, k) of the nearest images of `real`, the nearest first."""
    places = []
    for rows in torch.arange(len(made), device=made.device).split(max(1, BLOCK // len(real))):
        distances = torch.cdist(made[rows], real)
        if among_themselves:
            distances[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        places.append(distances.topk(k, largest=False).indices)
    return torch.cat(places)


def _right(places: Tensor, labels: Tensor, asked: Tensor) -> float:
    """Share of the rows of `places` (M, k) whose neighbours vote for the requested class in `asked` (M,)."""
    k = places.shape[1]
    votes = labels.to(places.device)[places]
    # the bonus for near neighbours stays below one vote in sum, so it only breaks ties
    weights = 1 + torch.arange(k, 0, -1, dtype=torch.float64, device=places.device) / (2 * k * k)
    count = int(max(labels.max(), asked.max())) + 1
    counts = torch.zeros(len(places), count, dtype=torch.float64, device=places.device)
    counts.scatter_add_(1, votes, weights.expand(len(places), k))
    return float((counts.argmax(1) == asked.to(places.device)).double().mean())
