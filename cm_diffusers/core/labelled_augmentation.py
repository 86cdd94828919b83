"""Augmentation whose parameters the network receives, so that it does not leak into samples.

Karras et al. 2022 (arXiv:2206.00364), appendix F.2, table 6: an image is mirrored, scaled, turned, stretched and
shifted, each with a small probability, and labels describe the changes. Sampling uses labels of zeros, which mean an
unchanged image.

All changes but mirroring use an image of twice the resolution, which the wavelet filter sym6 makes and undoes (Karras
et al. 2020, arXiv:2006.06676, appendix B.2). Two things differ from that paper:

- The region outside is the mirrored image, at any distance.
- Pixels are placed at the filter's own centre of mass, so that linear ramps move exactly.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cm_diffusers.core.draws import Draws


LABELS = 9
SCALE, STRETCH, SHIFT = 0.2, 0.2, 0.125  # standard deviations: in log2, in log2, and in sides of the image
# The low-pass filter of the least asymmetric orthogonal wavelet with 6 vanishing moments (Daubechies 1992, table 6.3)
SYM6 = (
    -0.007800708325034148, 0.0017677118642428036, 0.04472490177066578, -0.021060292512300564, -0.07263752278646252,
    0.3379294217276218, 0.787641141030194, 0.4910559419267466, -0.048311742585633, -0.11799011114819057,
    0.0034907120842174702, 0.015404109327027373,
)  # fmt: skip
CENTRE = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)
MARGIN = len(SYM6) // 4  # how many pixels beyond the border a place inside reads


def augment(images: Tensor, draws: Draws, probability: float) -> tuple[Tensor, Tensor]:
    """Change each image with its own random numbers, keyed by its row of the global batch.

    Half of the images are mirrored left to right; the labels show it like the other changes. Each of the following
    changes has `probability`, independently of the others. Every a and a' is a separate unit normal number.

    - Mirroring top to bottom, in half of these cases.
    - A scale of 2^(0.2 a).
    - A turn by an angle uniform in [-pi, pi).
    - A stretch by 2^(0.2 a) along an axis and by its inverse across. The axis is that of the rows in half of these
      cases, else any.
    - A shift by a and a' times 1/8 of the sides.

    Args:
        images: (B, C, H, W), float, sides of 2 pixels or more.
        draws: the random numbers of the step, for the same B rows.
        probability: in [0, 1].

    Returns:
        The images (B, C, H, W), and float32 labels (B, 9). Labels of zeros mean an unchanged image. Their columns are

        - mirrored left to right, and top to bottom (0 or 1),
        - a of the scale,
        - cos - 1 and sin of the turn,
        - a of the stretch times cos and sin of its axis,
        - a of the shift to the right, and a' of the shift down.

        A stretch a and one of -a along the opposite axis share their labels, as in the paper.
    """
    assert images.ndim == 4 and len(images) == len(draws.rows) and min(images.shape[2:]) > 1
    u = draws.uniform("augmentation", (10,)).to(images.device)
    chosen = (u[:, :5] < probability).float()
    mirror_x, mirror_y = (u[:, 5] < 0.5).float(), (u[:, 6] < 0.5).float() * chosen[:, 0]
    turn = math.pi * (2 * u[:, 7] - 1) * chosen[:, 2]
    axis = math.pi * (2 * u[:, 8] - 1) * (u[:, 9] < 0.5)
    sizes = draws.normal("augmentation sizes", (4,)).to(images.device).unbind(1)
    scale, stretch, right, down = (size * chosen[:, i] for size, i in zip(sizes, (1, 3, 4, 4)))
    parts = [mirror_x, mirror_y, scale, turn.cos() - 1, turn.sin()]
    labels = torch.stack([*parts, stretch * axis.cos(), stretch * axis.sin(), right, down], 1)
    for dim, mirror in ((3, mirror_x), (2, mirror_y)):
        images = torch.where(mirror[:, None, None, None] > 0, images.flip(dim), images)

    height, width = images.shape[2:]
    # from a place in the result to one in the image, about their centres: the inverse changes, the last one first
    shift = SHIFT * torch.stack([width * right, height * down], 1)
    s = 2 ** (STRETCH * stretch)
    undone = (2 ** (-SCALE * scale))[:, None, None] * _turn(turn)
    undone = undone @ _turn(-axis) @ torch.diag_embed(torch.stack([1 / s, s], 1)) @ _turn(axis)
    moved = labels[:, 2:].abs().amax(1) > 0
    return torch.where(moved[:, None, None, None], _read(images, undone, shift), images), labels


def _turn(angle: Tensor) -> Tensor:
    """Rotation matrices (B, 2, 2) on (x, y)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


def _mirrored(pixels: Tensor, last: Tensor | int) -> Tensor:
    """The places in [0, last] that `pixels` show when the row is mirrored at both ends, without limit."""
    return last - (pixels.remainder(2 * last) - last).abs()


def _filters(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (2 size + 10, size) that doubles a row of `size` pixels, and one that undoes it.

    Pixel m is at the place 2 m + CENTRE of the doubled row; beyond its ends the row is mirrored.
    """
    places, pixels = torch.arange(2 * size + len(SYM6) - 2), torch.arange(-MARGIN, size + MARGIN)
    tap = places[:, None] - 2 * pixels
    taps = torch.tensor(SYM6, dtype=torch.float64)
    band = torch.where((tap >= 0) & (tap < len(SYM6)), taps[tap.clamp(0, len(SYM6) - 1)], 0)
    double = band.new_zeros(len(places), size).index_add_(1, _mirrored(pixels, size - 1), band)
    return double.to(like), band[:, MARGIN:-MARGIN].T.to(like)


@lru_cache(maxsize=32)
def _tables(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The filters of columns and of rows, and the last pixel (x, y). They are kept, because a copy waits for a GPU."""
    last = torch.tensor([width - 1, height - 1], dtype=dtype).to(device)
    return *_filters(height, last), *_filters(width, last), last


def _read(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Images (B, C, H, W) that show at each place p, from the centre, the place matrix (p - shift) of `images`.

    Args:
        matrix: (B, 2, 2), on (x, y).
        shift: (B, 2), (x, y) in pixels.
    """
    double_y, halve_y, double_x, halve_x, last = _tables(*images.shape[2:], images.dtype, images.device)
    ends = 2 * last + len(SYM6) - 1  # the last places of the doubled image
    x, y = ((torch.arange(len(d), device=d.device).to(d.dtype) - CENTRE) / 2 for d in (double_x, double_y))
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) - last / 2
    places = torch.einsum("bij,bhwj->bhwi", matrix.to(images), places - shift.to(images)[:, None, None])
    grid = 2 * (2 * _mirrored(places + last / 2, last) + CENTRE) / ends - 1
    read = F.grid_sample(double_y @ images @ double_x.T, grid, align_corners=True)
    return halve_y @ read @ halve_x.T
