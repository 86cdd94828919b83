import math

import numpy as np
import pytest
import torch

from cm_diffusers.core.differentiable_augmentation import _colour, _cut_out, _translate, differentiable_augmentation
from cm_diffusers.core.draws import Draws


SHAPES = [(1, 8, 8), (3, 16, 24), (3, 28, 28), (1, 7, 5)]


def images(rows=8, shape=(3, 16, 24), dtype=torch.float64):
    return (2 * torch.rand(rows, *shape, generator=torch.Generator().manual_seed(0)) - 1).to(dtype)


def uniforms(count, rows=8):
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(1))


# a plain reference for one image at a time


def coloured(x, u):
    x = x + u[0] - 0.5
    grey = x.mean(0, keepdims=True)
    x = grey * (1 - 2 * u[1]) + x * (2 * u[1])
    return (x - x.mean()) * (u[2] + 0.5) + x.mean()


def translated(x, u):
    (_, height, width), out = x.shape, np.zeros_like(x)
    down, right = (math.floor(v * (2 * (side // 8) + 1)) - side // 8 for v, side in zip(u, (height, width)))
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                out[:, i, j] = x[:, i - down, j - right]
    return out


def cut_out(x, u):
    (_, height, width), out = x.shape, x.copy()
    top, left = (math.floor(v * side) - side // 4 for v, side in zip(u, (height, width)))
    out[:, max(top, 0) : max(top + height // 2, 0), max(left, 0) : max(left + width // 2, 0)] = 0
    return out


KINDS = {"colour": (_colour, coloured, 3), "translate": (_translate, translated, 2), "cut": (_cut_out, cut_out, 2)}


def by_rows(function, x, u):
    return torch.stack([torch.from_numpy(function(image.numpy(), v.double().numpy())) for image, v in zip(x, u)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_a_loop_over_the_images_does(kind, shape):
    function, oracle, count = KINDS[kind]
    x, u = images(64, shape), uniforms(count, 64)
    u[0], u[1] = 0, 1 - 2**-24  # the ends of the range
    torch.testing.assert_close(function(x, u), by_rows(oracle, x, u), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_of_them_one_after_the_other(shape):
    x, draws = images(8, shape), Draws(3, 5, range(8))
    u = draws.uniform("real augmentation", (7,))
    expected = by_rows(coloured, x, u[:, :3])
    expected = by_rows(cut_out, by_rows(translated, expected, u[:, 3:5]), u[:, 5:])
    torch.testing.assert_close(differentiable_augmentation(x, draws, "real"), expected, rtol=0, atol=1e-12)


def test_shifts_and_holes_are_as_large_as_said_and_reach_everywhere():
    x, u = torch.ones(4000, 1, 16, 24), uniforms(2, 4000)
    kept = _translate(x, u)[:, 0] == 1
    tops = {(int(rows.min()), int(rows.max()) - 15) for rows in (k.any(1).nonzero()[:, 0] for k in kept)}
    assert tops == {(0, -2), (0, -1), (0, 0), (1, 0), (2, 0)}
    assert kept.any(1).sum(1).min() == 24 - 3
    hole = _cut_out(x, u)[:, 0] == 0
    assert hole.sum((1, 2)).max() == 8 * 12 and hole.sum((1, 2)).min() == 4 * 6
    assert hole.any(0).all() and not hole.all(0).any()


def test_gradients_reach_the_images():
    x, draws = images(3, (2, 8, 9)).requires_grad_(), Draws(0, 0, range(3))
    assert torch.autograd.gradcheck(lambda x: differentiable_augmentation(x, draws, "fake"), x)
    (gradient,) = torch.autograd.grad(differentiable_augmentation(x, draws, "fake").square().sum(), x)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_a_row_does_not_depend_on_how_the_batch_is_split():
    x = images(dtype=torch.float32)
    whole = differentiable_augmentation(x, Draws(7, 3, range(8)), "real")
    parts = [
        differentiable_augmentation(x[rows], Draws(7, 3, range(8)[rows]), "real") for rows in (slice(4), slice(4, 8))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_the_same_key_gives_the_same_images_and_another_gives_others():
    x, state = images(), torch.get_rng_state()
    first = differentiable_augmentation(x, Draws(7, 3, range(8)), "real")
    assert torch.equal(differentiable_augmentation(x, Draws(7, 3, range(8)), "real"), first)
    for draws, name in (
        (Draws(7, 3, range(8)), "fake"),
        (Draws(7, 4, range(8)), "real"),
        (Draws(8, 3, range(8)), "real"),
    ):
        other = differentiable_augmentation(x, draws, name)
        assert ((other - first).abs().amax((1, 2, 3)) > 1e-3).all()
    same = differentiable_augmentation(x[:1].expand(8, -1, -1, -1), Draws(7, 3, range(8)), "real")
    assert ((same[1:] - same[0]).abs().amax((1, 2, 3)) > 1e-3).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype):
    draws, exact = Draws(0, 0, range(8)), images()
    out = differentiable_augmentation(exact.to(dtype), draws, "real")
    assert out.dtype == dtype
    error = (out.double() - differentiable_augmentation(exact, draws, "real")).abs().max()
    assert error < 40 * torch.finfo(dtype).eps
