"""Augmentation that does not leak into samples, as the network is told of it (Karras et al. 2022, arXiv:2206.00364).

Appendix F.2, table 6: an image is mirrored, scaled, turned, stretched and shifted, each with a small probability, and
labels say how. Samples are made with labels of zeros, which are those of an image that was left alone.

What moves between pixels goes through an image of twice the resolution, made and undone by the wavelet filter sym6
(Karras et al. 2020, arXiv:2006.06676, appendix B.2). Two things differ from there: what comes in from outside is the
mirrored image, however far outside it is, and pixels are placed at the filter's own centre of mass, so that linear
ramps are moved exactly.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cm_diffusers.core.draws import Draws


LABELS = 9
SCALE, STRETCH, SHIFT = 0.2, 0.2, 0.125  # standard deviations: of log2, of log2, and in sides of the image
# The low-pass filter of the least asymmetric orthogonal wavelet with 6 vanishing moments (Daubechies 1992, table 6.3)
SYM6 = (
    -0.007800708325034148, 0.0017677118642428036, 0.04472490177066578, -0.021060292512300564, -0.07263752278646252,
    0.3379294217276218, 0.787641141030194, 0.4910559419267466, -0.048311742585633, -0.11799011114819057,
    0.0034907120842174702, 0.015404109327027373,
)  # fmt: skip
CENTRE = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)
MARGIN = len(SYM6) // 4  # pixels beyond the border that a sample inside reads


def augment(images: Tensor, draws: Draws, probability: float) -> tuple[Tensor, Tensor]:
    """Change every image by numbers of its own, keyed by its row of the global batch, and say how.

    Half of the images are mirrored left to right, which counts as an augmentation like the others. With `probability`
    each, and independently: mirroring top to bottom in half of these cases; a scale of 2^(0.2 a); a turn by an angle
    uniform in [-pi, pi); a stretch by 2^(0.2 a) along an axis and by its inverse across, the axis being the rows' in
    half of these cases and else any; a shift by 1/8 of either side times a, a'. All a are unit normals.

    Args:
        images: (B, C, H, W), float, sides of 2 pixels or more.
        draws: the step's numbers, for the same B rows.
        probability: in [0, 1].

    Returns:
        The images, and float32 labels (B, 9): mirrored left to right and top to bottom (0 or 1), a of the scale,
        cos - 1 and sin of the turn, a of the stretch times cos and sin of its axis, a and a' of the shift to the right
        and down. Labels of zeros are those of an image that is returned as it came. A stretch a and one of -a along
        the opposite axis share their labels, as in the paper.
    """
    assert images.ndim == 4 and len(images) == len(draws.rows) and min(images.shape[2:]) > 1
    u = draws.uniform("augmentation", (10,)).to(images.device)
    chosen = (u[:, :5] < probability).float()
    mirror_x, mirror_y = (u[:, 5] < 0.5).float(), (u[:, 6] < 0.5).float() * chosen[:, 0]
    turn = math.pi * (2 * u[:, 7] - 1) * chosen[:, 2]
    axis = math.pi * (2 * u[:, 8] - 1) * (u[:, 9] < 0.5)
    normals = draws.normal("augmentation sizes", (4,)).to(images.device) * chosen[:, [1, 3, 4, 4]]
    scale, stretch, right, down = normals.unbind(1)
    parts = [mirror_x, mirror_y, scale, turn.cos() - 1, turn.sin()]
    labels = torch.stack([*parts, stretch * axis.cos(), stretch * axis.sin(), right, down], 1)
    for dim, mirror in ((3, mirror_x), (2, mirror_y)):
        images = torch.where(mirror[:, None, None, None] > 0, images.flip(dim), images)

    height, width = images.shape[2:]
    # from where in the result to where in the image, about their middles: the changes undone, the last one first
    shift = SHIFT * torch.stack([width * right, height * down], 1)
    s = 2 ** (STRETCH * stretch)
    undone = (2 ** (-SCALE * scale))[:, None, None] * _turn(turn)
    undone = undone @ _turn(-axis) @ torch.diag_embed(torch.stack([1 / s, s], 1)) @ _turn(axis)
    moved = labels[:, 2:].abs().amax(1) > 0
    return torch.where(moved[:, None, None, None], _read(images, undone, shift), images), labels


def _turn(angle: Tensor) -> Tensor:
    """Matrices (B, 2, 2) on (x, y)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


def _mirrored(pixels: Tensor, last: Tensor | int) -> Tensor:
    """Where in [0, last] each place is that is reached by mirroring at both ends, as often as it takes."""
    return last - (pixels.remainder(2 * last) - last).abs()


def _filters(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices that double a row of `size` pixels, (2 size + 10, size), and halve one, its inverse inside.

    Pixel m has the place 2 m + CENTRE of the doubled row; beyond its ends the row is mirrored.
    """
    places, pixels = torch.arange(2 * size + len(SYM6) - 2), torch.arange(-MARGIN, size + MARGIN)
    tap = places[:, None] - 2 * pixels
    taps = torch.tensor(SYM6, dtype=torch.float64)
    band = torch.where((tap >= 0) & (tap < len(SYM6)), taps[tap.clamp(0, len(SYM6) - 1)], 0)
    double = band.new_zeros(len(places), size).index_add_(1, _mirrored(pixels, size - 1), band)
    return double.to(like), band[:, MARGIN:-MARGIN].T.to(like)


def _read(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """The images (B, C, H, W) whose place p, from the middle, shows the place matrix (p - shift) of `images`.

    Args:
        matrix: (B, 2, 2), on (x, y).
        shift: (B, 2), (x, y) in pixels.
    """
    height, width = images.shape[2:]
    (double_y, halve_y), (double_x, halve_x) = _filters(height, images), _filters(width, images)
    last = torch.tensor([width - 1, height - 1]).to(images)
    ends = 2 * last + len(SYM6) - 1  # the last places of the doubled image
    x, y = ((torch.arange(len(d)).to(images) - CENTRE) / 2 for d in (double_x, double_y))
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) - last / 2
    places = torch.einsum("bij,bhwj->bhwi", matrix.to(images), places - shift.to(images)[:, None, None])
    grid = 2 * (2 * _mirrored(places + last / 2, last) + CENTRE) / ends - 1
    read = F.grid_sample(double_y @ images @ double_x.T, grid, align_corners=True)
    return halve_y @ read @ halve_x.T
