"""Augmented images and their labels: against formulas on smooth pictures, and exactly where pixels only move."""

import math

import numpy as np
import pytest
import torch

from cm_diffusers.core.draws import Draws
from cm_diffusers.core.labelled_augmentation import SYM6, _filters, _read, augment
from tests.helpers.dispatched import Dispatched


def waves(x, y, height, width):
    """A smooth picture without symmetry, continued beyond its edges by its mirror image."""
    x, y = math.pi * x / (width - 1), math.pi * y / (height - 1)
    return np.cos(x) + 0.6 * np.cos(2 * x) * np.cos(y) - 0.4 * np.cos(y)


def pixels(height, width):
    return np.mgrid[:height, :width].astype(float)


def picture(rows, height, width):
    y, x = pixels(height, width)
    return torch.from_numpy(waves(x, y, height, width)).expand(rows, 1, -1, -1)


def noise(rows=8, shape=(3, 16, 24), dtype=torch.float64):
    return (2 * torch.rand(rows, *shape, generator=torch.Generator().manual_seed(0)) - 1).to(dtype)


def as_said(label, height, width, sign):
    """The waves augmented as `label` describes, computed from each pixel's origin in complex numbers.

    A stretch a along an axis has the same label as -a along the opposite axis; `sign` selects one of the two.
    """
    mirror_x, mirror_y, scale, cos, sin, along, across, right, down = label
    y, x = pixels(height, width)
    place = x - (width - 1) / 2 - right * width / 8 + 1j * (y - (height - 1) / 2 - down * height / 8)
    stretch, axis = 2 ** (0.2 * sign * math.hypot(along, across)), np.exp(1j * math.atan2(across, along))
    place = place * axis
    place = (place.real / stretch + 1j * place.imag * stretch) / axis
    place = place * (1 + cos + 1j * sin) / 2 ** (0.2 * scale)
    x, y = place.real + (width - 1) / 2, place.imag + (height - 1) / 2
    return waves(width - 1 - x if mirror_x else x, height - 1 - y if mirror_y else y, height, width)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_images_are_what_their_labels_say(size):
    images, labels = augment(picture(128, *size), Draws(3, 5, range(128)), 0.7)
    for image, label in zip(images[:, 0].numpy(), labels.double().tolist()):
        errors = [np.abs(image - as_said(label, *size, sign)).max() for sign in (1, -1)]
        assert min(errors) < 0.003
        if abs(label[5]) > 0.5 and not label[6]:  # along the rows the label gives the sign
            assert errors[label[5] < 0] < 0.003 < 0.02 < max(errors)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (2, 5)], ids=str)
def test_labels_of_zeros_are_those_of_images_left_alone(size):
    x = noise(256, (3, *size))
    images, labels = augment(x, Draws(0, 0, range(256)), 0.12)
    mirrored, moved = labels[:, 0] > 0, labels[:, 1:].abs().amax(1) > 0
    alone = ~mirrored & ~moved
    assert 40 < alone.sum() < 110
    assert torch.equal(images[alone], x[alone])
    assert torch.equal(images[mirrored & ~moved], x.flip(3)[mirrored & ~moved])
    assert ((images - x)[moved].abs().amax((1, 2, 3)) > 1e-3).all()


def test_each_change_has_its_probability_and_law():
    labels = augment(noise(4000, (1, 4, 4)), Draws(1, 0, range(4000)), 0.4)[1]
    mirror_x, mirror_y, scale, cos, sin, along, across, right, down = labels.double().unbind(1)
    error = 4 * (0.25 / 4000) ** 0.5

    def share(condition):
        return condition.double().mean().item()

    assert share(mirror_x == 1) == pytest.approx(0.5, abs=error) and set(mirror_x.tolist()) == {0, 1}
    assert share(mirror_y == 1) == pytest.approx(0.2, abs=error)
    stretched, turned = along.square() + across.square() > 0, sin != 0
    for chosen in (scale != 0, turned, stretched, right != 0):
        assert share(chosen) == pytest.approx(0.4, abs=error)
    assert torch.equal(right != 0, down != 0)
    assert share((scale != 0) & turned) == pytest.approx(0.16, abs=error)  # independent of each other
    assert share(across[stretched] == 0) == pytest.approx(0.5, abs=0.1)
    for normal in (scale[scale != 0], right[right != 0], down[down != 0], (along**2 + across**2)[stretched].sqrt()):
        assert normal.square().mean().item() == pytest.approx(1, abs=0.15)
    angles = torch.atan2(sin, cos + 1)[turned]
    torch.testing.assert_close(cos + 1, (1 - sin**2).sqrt() * (cos + 1).sign(), rtol=0, atol=1e-3)
    assert angles.mean().abs() < 0.2 and angles.var().item() == pytest.approx(math.pi**2 / 3, rel=0.15)
    assert augment(noise(64, (1, 4, 4)), Draws(1, 0, range(64)), 0)[1].any(0).tolist() == [True] + 8 * [False]


def test_the_filter_is_orthogonal_with_six_vanishing_moments():
    taps, k = torch.tensor(SYM6, dtype=torch.float64), torch.arange(12.0, dtype=torch.float64)
    for shift in range(6):
        product = (taps[2 * shift :] * taps[: 12 - 2 * shift]).sum().item()
        assert product == pytest.approx(float(shift == 0), abs=1e-11)
    for moment in range(6):
        assert ((-1) ** k * (k - 5.5) ** moment * taps).sum().item() == pytest.approx(0, abs=1e-8)
    double, halve = _filters(16, taps)
    torch.testing.assert_close((halve @ double)[3:-3], torch.eye(16, dtype=torch.float64)[3:-3], rtol=0, atol=1e-11)


def test_whole_pixels_are_moved_exactly():
    x = noise(2, (3, 24, 32))
    still, shift = torch.eye(2).double().expand(2, -1, -1), torch.tensor([[5.0, -3.0], [0, 0]]).double()
    moved = _read(x, still, shift)
    torch.testing.assert_close(moved[0, :, 3:18, 8:29], x[0, :, 6:21, 3:24], rtol=0, atol=1e-11)
    torch.testing.assert_close(moved[1, :, 3:-3, 3:-3], x[1, :, 3:-3, 3:-3], rtol=0, atol=1e-11)


def test_ramps_are_moved_exactly_inside():
    y, x = (torch.from_numpy(v) for v in pixels(40, 48))
    matrix, shift = torch.tensor([[[0.8, -0.5], [0.4, 1.1]]]).double(), torch.tensor([[1.3, -0.7]]).double()
    moved = _read((0.3 * x - 0.2 * y + 1)[None, None], matrix, shift)[0, 0]
    place = torch.stack([x - 23.5, y - 19.5], -1) - shift[0]
    source = place @ matrix[0].T + torch.tensor([23.5, 19.5])
    expected = 0.3 * source[..., 0] - 0.2 * source[..., 1] + 1
    inside = (slice(12, -12), slice(12, -12))
    torch.testing.assert_close(moved[inside], expected[inside], rtol=0, atol=1e-9)


def test_a_row_does_not_depend_on_how_the_batch_is_split():
    x = noise(dtype=torch.float32)
    whole = augment(x, Draws(7, 3, range(8)), 0.8)
    halves = [augment(x[rows], Draws(7, 3, range(8)[rows]), 0.8) for rows in (slice(4), slice(4, 8))]
    for a, b in zip(whole, zip(*halves)):
        torch.testing.assert_close(a, torch.cat(b), rtol=0, atol=1e-6)
    for draws in (Draws(7, 4, range(8)), Draws(8, 3, range(8))):
        assert (augment(x, draws, 0.8)[1] - whole[1]).abs().sum(1).min() > 1e-3


def test_a_second_batch_copies_nothing_from_the_host():
    """A copy to a GPU would wait for the work in its queue. "meta" stands for the GPU."""
    for step in range(2):
        x, draws = torch.zeros(3, 1, 8, 10, device="meta"), Draws(0, step, range(3), "meta")
        with Dispatched() as dispatched:
            images, labels = augment(x, draws, 0.5)
    assert images.shape == x.shape and labels.shape == (3, 9)
    assert dispatched.devices and all(devices == {"meta"} for devices in dispatched.devices)
