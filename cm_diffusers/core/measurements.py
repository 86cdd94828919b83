"""Linear measurements of images, as orthogonal projections P: P x is what they tell of x, and x - P x the rest.

`put_into` makes an image agree with a measurement and leaves the rest as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor


Projection = Callable[[Tensor], Tensor]
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, by ITU-R BT.601


def put_into(x: Tensor, project: Projection, told: Tensor) -> Tensor:
    """The image nearest to `x` of which the measurement tells `told`, a P y of some y."""
    return x - project(x) + told


def inside(known: Tensor) -> Projection:
    """The pixels where `known` (..., H, W) is 1; it is 0 elsewhere."""
    return lambda x: known.to(x) * x


def luma(x: Tensor) -> Tensor:
    """The luma w . x of RGB images (B, 3, H, W): P x = w (w . x) / |w|^2."""
    weights = x.new_tensor(LUMA).reshape(3, 1, 1)
    return weights * (weights * x).sum(1, keepdim=True) / (weights**2).sum()


def averages(coarse: tuple[int, int], fine: tuple[int, int]) -> Projection:
    """The averages of images (..., H, W) of the size `fine` over the cells of a grid of the size `coarse`."""
    rows, columns = (_cells(n, size) for n, size in zip(coarse, fine))
    onto_rows, onto_columns = (torch.linalg.pinv(cells) @ cells for cells in (rows, columns))
    return lambda x: onto_rows.to(x) @ x @ onto_columns.to(x).mT


def of_averages(values: Tensor, fine: tuple[int, int]) -> Tensor:
    """The P y (..., H, W) of images y of the size `fine` whose averages are `values` (..., h, w)."""
    rows, columns = (torch.linalg.pinv(_cells(n, size)).to(values) for n, size in zip(values.shape[-2:], fine))
    return rows @ values @ columns.mT


def _cells(n: int, size: int) -> Tensor:
    """The matrix (n, size) that averages `size` pixels over n cells of one width; a cell may end inside a pixel."""
    ends, pixels = torch.arange(n + 1, dtype=torch.float64) * size / n, torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(ends[1:, None], pixels + 1) - torch.maximum(ends[:-1, None], pixels)
    return overlap.clamp(min=0) * n / size
