"""Random, differentiable changes to the images that a discriminator sees, both real and generated.

DiffAugment (Zhao et al. 2020, arXiv:2006.10738, section 3): colour, translation and cutout, in this order. The
ranges are the paper's, for pixels in [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cm_diffusers.core.draws import Draws


def differentiable_augmentation(images: Tensor, draws: Draws, name: str) -> Tensor:
    """Augment each image with its own random numbers, keyed by its row of the global batch.

    - Brightness: adds a number in [-0.5, 0.5).
    - Saturation: scales the difference from each pixel's mean over the channels by a factor in [0, 2).
    - Contrast: scales the difference from the image's mean by a factor in [0.5, 1.5).
    - Translation: shifts by whole pixels, up to 1/8 of either side.
    - Cutout: makes a hole of half of either side around a pixel of the image. Part of the hole can lie outside.

    The hole and pixels from outside are 0, mid-grey: as far from black as from white, and visible on a black
    background. With black a generator's off-centre digit would pass for a shifted, centred digit. Nothing is clamped
    to [-1, 1], because a clamp stops gradients.

    Args:
        images: (B, C, H, W) in [-1, 1], a floating dtype.
        draws: the random numbers of the step, for the same B rows.
        name: the kind of these images. Different names give independent changes; the same name repeats its changes.

    Returns:
        (B, C, H, W) in the dtype of `images`.
    """
    assert images.ndim == 4 and len(images) == len(draws.rows)
    u = draws.uniform(f"{name} augmentation", (7,)).to(images.device)
    return _cut_out(_translate(_colour(images, u[:, :3]), u[:, 3:5]), u[:, 5:])


def _colour(images: Tensor, u: Tensor) -> Tensor:
    """Change colours by `u` (B, 3): brightness, saturation, contrast."""
    brightness, saturation, contrast = u.to(images.dtype)[..., None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (images - mean)


def _translate(images: Tensor, u: Tensor) -> Tensor:
    """Shift by `u` (B, 2): in rows, in columns."""
    for dim, fraction in ((2, u[:, 0]), (3, u[:, 1])):
        size = images.shape[dim]
        most = size // 8
        shift = (fraction * (2 * most + 1)).long() - most
        padding = (0, 0, most, most) if dim == 2 else (most, most)
        # each pixel is read at most once, so the backward pass sums nothing and is deterministic on a GPU as well
        source = torch.arange(size, device=images.device) + most - shift[:, None]
        source = source[:, None, :, None] if dim == 2 else source[:, None, None, :]
        images = F.pad(images, padding).gather(dim, source.expand(images.shape))
    return images


def _cut_out(images: Tensor, u: Tensor) -> Tensor:
    """Make a hole whose centre `u` (B, 2) places: row, column."""
    inside = []
    for size, fraction in zip(images.shape[2:], u.unbind(1)):
        first = (fraction * size).long() - size // 4
        position = torch.arange(size, device=images.device) - first[:, None]
        inside.append((position >= 0) & (position < size // 2))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
