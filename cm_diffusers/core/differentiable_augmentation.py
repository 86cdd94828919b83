"""Random changes to the images that a discriminator sees, real and made alike, through which gradients pass.

DiffAugment (Zhao et al. 2020, arXiv:2006.10738, section 3): colour, translation and cutout, in this order. The
ranges are the paper's, for pixels in [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cm_diffusers.core.draws import Draws


def differentiable_augmentation(images: Tensor, draws: Draws, name: str) -> Tensor:
    """Augment every image by numbers of its own, keyed by its row of the global batch.

    Brightness adds [-0.5, 0.5); saturation times [0, 2) about each pixel's mean over the channels; contrast times
    [0.5, 1.5) about the image's mean; a shift by whole pixels, up to 1/8 of either side; a hole of half of either side
    around a pixel of the image, so that a part of the hole may lie outside.

    What comes in from outside and the hole are 0, mid-grey: as far from black as from white, and visible on a black
    background, where black would let a generator's off-centre digit pass for a centred one that was shifted. Nothing
    is clamped to [-1, 1], as gradients would end there.

    Args:
        images: (B, C, H, W) in [-1, 1], a floating dtype.
        draws: the step's numbers, for the same B rows.
        name: which images these are; each name has numbers of its own, and the same name gives the same ones.

    Returns:
        (B, C, H, W) in the dtype of `images`.
    """
    assert images.ndim == 4 and len(images) == len(draws.rows)
    u = draws.uniform(f"{name} augmentation", (7,)).to(images.device)
    return _cut_out(_translate(_colour(images, u[:, :3]), u[:, 3:5]), u[:, 5:])


def _colour(images: Tensor, u: Tensor) -> Tensor:
    """`u` (B, 3) for brightness, saturation and contrast."""
    brightness, saturation, contrast = u.to(images.dtype)[..., None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (images - mean)


def _translate(images: Tensor, u: Tensor) -> Tensor:
    """`u` (B, 2) for the shift in rows and in columns."""
    for dim, fraction in ((2, u[:, 0]), (3, u[:, 1])):
        size = images.shape[dim]
        most = size // 8
        shift = (fraction * (2 * most + 1)).long() - most
        padding = (0, 0, most, most) if dim == 2 else (most, most)
        # each pixel is read once at most, so the backward pass adds nothing up and is deterministic on a GPU as well
        source = torch.arange(size, device=images.device) + most - shift[:, None]
        source = source[:, None, :, None] if dim == 2 else source[:, None, None, :]
        images = F.pad(images, padding).gather(dim, source.expand(images.shape))
    return images


def _cut_out(images: Tensor, u: Tensor) -> Tensor:
    """`u` (B, 2) for the row and the column of the hole's centre."""
    inside = []
    for size, fraction in zip(images.shape[2:], u.unbind(1)):
        first = (fraction * size).long() - size // 4
        position = torch.arange(size, device=images.device) - first[:, None]
        inside.append((position >= 0) & (position < size // 2))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
