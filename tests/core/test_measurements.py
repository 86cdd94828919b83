"""Measurements of images: projections keep the measured values."""

import numpy as np
import pytest
import torch

from cm_diffusers.core.measurements import LUMA, averages, inside, luma, of_averages, put_into


MASK = (torch.arange(35).reshape(5, 7) % 3 == 0).double()
PROJECTIONS = {
    "inside": inside(MASK),
    "luma": luma,
    "averages over whole pixels": averages((5, 1), (5, 7)),
    "averages over parts of pixels": averages((2, 3), (5, 7)),
    "all pixels": averages((5, 7), (5, 7)),
}


def image(seed=0):
    return torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_measurement_is_an_orthogonal_projection(name):
    project = PROJECTIONS[name]
    x, y = image(1), image(2)
    torch.testing.assert_close(project(project(x)), project(x), rtol=0, atol=1e-14)
    torch.testing.assert_close((project(x) * y).sum(), (x * project(y)).sum(), rtol=0, atol=1e-13)
    made = put_into(x, project, project(y))
    torch.testing.assert_close(project(made), project(y), rtol=0, atol=1e-14)
    torch.testing.assert_close(made - project(made), x - project(x), rtol=0, atol=1e-14)


def test_each_keeps_what_it_is_called_by():
    x, y = image(1), image(2)
    made = put_into(x, inside(MASK), inside(MASK)(y))
    assert torch.equal(made[..., MASK == 1], y[..., MASK == 1]) and torch.equal(
        made[..., MASK == 0], x[..., MASK == 0]
    )
    weights = torch.tensor(LUMA, dtype=torch.float64)
    grey = torch.einsum("bchw,c->bhw", put_into(x, luma, luma(y)), weights)
    torch.testing.assert_close(grey, torch.einsum("bchw,c->bhw", y, weights), rtol=0, atol=1e-14)


@pytest.mark.parametrize("coarse", [(1, 1), (2, 3), (4, 6), (5, 7)])
def test_averages_are_those_over_the_cells(coarse):
    pixels, (height, width) = np.random.default_rng(0).random((5, 7)), coarse
    small = [
        [cell_average(pixels, i * 5 / height, 5 / height, j * 7 / width, 7 / width) for j in range(width)]
        for i in range(height)
    ]
    told = of_averages(torch.tensor([small]), (5, 7))
    project = averages(coarse, (5, 7))
    torch.testing.assert_close(project(torch.from_numpy(pixels)[None]), told, rtol=0, atol=1e-13)
    torch.testing.assert_close(project(told), told, rtol=0, atol=1e-14)


def cell_average(pixels, top, height, left, width, fine=420):
    """The average over a rectangle, on a grid finer than pixels (420 is a multiple of all sizes here)."""
    rows = np.floor(top + (np.arange(fine) + 0.5) * height / fine).astype(int)
    columns = np.floor(left + (np.arange(fine) + 0.5) * width / fine).astype(int)
    return pixels[np.ix_(rows, columns)].mean()
