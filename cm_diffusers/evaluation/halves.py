"""A quick evaluation of samples with few real images: their distances to one half of these images."""

import torch
from torch import Tensor

from cm_diffusers.evaluation.classifier import train_classifier
from cm_diffusers.evaluation.frechet import frechet_distance


HALVES = "real half against real half"


def distances_to_half(samples: dict[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, float]:
    """Fréchet distances of samples to one half of the real images.

    The features are those of a small classifier trained on all real images.

    Args:
        samples: images (N, C, H, W) in [0, 1], by name.
        images: all real images (M, C, H, W), uint8.
        labels: classes of the real images, int64 (M,), from 0 on.

    Returns:
        Distances under the same names, rounded to three decimals. The key `HALVES` has that of the other half.
    """
    real = images.float() / 255
    classifier = train_classifier(real, labels)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    one, other = (classifier.features(real[half]) for half in order.tensor_split(2))
    distances = {name: frechet_distance(classifier.features(made), one) for name, made in samples.items()}
    distances[HALVES] = frechet_distance(other, one)
    return {name: round(value, 3) for name, value in distances.items()}
