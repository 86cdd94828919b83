"""Linear measurements of images, as orthogonal projections P.

P x is the part of x that the measurement determines, and x - P x is the rest. `put_into` makes an image agree with a
measurement and keeps its rest.
"""

from collections.abc import Callable

import torch
from torch import Tensor


Projection = Callable[[Tensor], Tensor]
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, by ITU-R BT.601


def put_into(x: Tensor, project: Projection, told: Tensor) -> Tensor:
    """The images nearest to `x` (..., H, W) whose projection by `project` is `told`, the P y of some images y."""
    return x - project(x) + told


def inside(known: Tensor) -> Projection:
    """The projection onto the pixels where the mask `known` (..., H, W) is 1; the mask is 0 elsewhere."""
    return lambda x: known.to(x) * x


def luma(x: Tensor) -> Tensor:
    """The projection of RGB images `x` (B, 3, H, W) onto their luma w . x: P x = w (w . x) / |w|^2."""
    weights = x.new_tensor(LUMA).reshape(3, 1, 1)
    return weights * (weights * x).sum(1, keepdim=True) / (weights**2).sum()


def averages(coarse: tuple[int, int], fine: tuple[int, int]) -> Projection:
    """The projection of images (..., H, W) onto their averages over the cells of a grid.

    Args:
        coarse: rows and columns of the grid.
        fine: height and width of the images.
    """
    rows, columns = (_cells(n, size) for n, size in zip(coarse, fine))
    onto_rows, onto_columns = (torch.linalg.pinv(cells) @ cells for cells in (rows, columns))
    return lambda x: onto_rows.to(x) @ x @ onto_columns.to(x).mT


def of_averages(values: Tensor, fine: tuple[int, int]) -> Tensor:
    """P y (..., H, W) of any images y of height and width `fine` whose averages are `values` (..., h, w)."""
    rows, columns = (torch.linalg.pinv(_cells(n, size)).to(values) for n, size in zip(values.shape[-2:], fine))
    return rows @ values @ columns.mT


def _cells(n: int, size: int) -> Tensor:
    """The matrix (n, size) that averages `size` pixels over n cells of equal width; a cell can end inside a pixel."""
    ends, pixels = torch.arange(n + 1, dtype=torch.float64) * size / n, torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(ends[1:, None], pixels + 1) - torch.maximum(ends[:-1, None], pixels)
    return overlap.clamp(min=0) * n / size
