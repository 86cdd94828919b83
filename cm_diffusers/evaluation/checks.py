"""What every metric asks of its features."""

import torch
from torch import Tensor


def checked(*sets: Tensor, at_least: int = 2) -> list[Tensor]:
    """The sets of features (N, d) in float64. Raises ValueError for other shapes, too few rows, non-finite values."""
    if any(f.ndim != 2 or f.shape[1] != sets[0].shape[-1] or len(f) < at_least for f in sets):
        shapes = " and ".join(str(tuple(f.shape)) for f in sets)
        raise ValueError(f"features must have the shapes (N, d) and (M, d), N and M >= {at_least}; got {shapes}.")
    for features in sets:
        bad = (~torch.isfinite(features)).any(1).sum().item()
        if bad:
            raise ValueError(f"features of {bad} of {len(features)} images are not finite: are the images broken?")
    return [f.double() for f in sets]


def as_rgb(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) of images (B, C, H, W): grey ones get three equal channels. Raises ValueError for others."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"this extractor takes images of 1 or 3 channels; got {images.shape[1]}.")
    return images.expand(-1, 3, -1, -1)
