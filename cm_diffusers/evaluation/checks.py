"""Checks of features and images that all metrics share."""

import torch
from torch import Tensor


def checked(*sets: Tensor, at_least: int = 2) -> list[Tensor]:
    """Check `sets` of features (N, d), each with `at_least` this many rows, and return them in float64.

    Raises:
        ValueError: other shapes, too few rows, or non-finite values.
    """
    if any(f.ndim != 2 or f.shape[1] != sets[0].shape[-1] or len(f) < at_least for f in sets):
        shapes = " and ".join(str(tuple(f.shape)) for f in sets)
        raise ValueError(f"features must have the shapes (N, d) and (M, d), N and M >= {at_least}; got {shapes}.")
    for features in sets:
        bad = (~torch.isfinite(features)).any(1).sum().item()
        if bad:
            raise ValueError(f"features of {bad} of {len(features)} images are not finite. Are the images broken?")
    return [f.double() for f in sets]


def as_rgb(images: Tensor) -> Tensor:
    """Turn `images` (B, C, H, W) into (B, 3, H, W): grey images get three equal channels.

    Raises:
        ValueError: the images have neither 1 nor 3 channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"this extractor reads images of 1 or 3 channels; got {images.shape[1]}.")
    return images.expand(-1, 3, -1, -1)
