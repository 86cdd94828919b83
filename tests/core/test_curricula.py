"""The grids, laws and weights of CT and iCT, against values from the papers' formulas."""

from functools import partial

import pytest
import torch

from cm_diffusers.core.draws import Draws
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.noise_levels import draw_bins, draw_levels, lognormal_bins, uniform_bins
from cm_diffusers.core.schedules import ct_scales, ct_target_decay, ict_scales
from cm_diffusers.core.weightings import edm_weight, inverse_gap, karras_weight, snr_weight
from tests.helpers.dispatched import Dispatched


@pytest.mark.parametrize(
    "step, scales", [(0, 2), (1, 3), (100, 3), (1000, 6), (10_000, 17), (100_000, 54), (400_000, 107), (800_000, 151)]
)
def test_ct_grows_its_grid_to_s1_plus_1(step, scales):
    assert ct_scales(step, 800_000, s0=2, s1=150) == scales


@pytest.mark.parametrize("step, scales", [(1000, 8), (10_000, 23), (100_000, 72), (400_000, 143), (800_000, 201)])
def test_ct_grows_its_grid_on_imagenet(step, scales):
    assert ct_scales(step, 800_000, s0=2, s1=200) == scales


@pytest.mark.parametrize("scales, mu", [(2, 0.9025), (54, 0.99806628), (107, 0.99903267), (151, 0.99931632)])
def test_ct_slows_its_target(scales, mu):
    assert ct_target_decay(scales, s0=2, mu0=0.95) == pytest.approx(mu, abs=6e-9)


@pytest.mark.parametrize(
    "step, scales",
    [
        (0, 11),
        (49_999, 11),
        (50_000, 21),
        (100_000, 41),
        (200_000, 161),
        (349_999, 641),
        (350_000, 1281),
        (400_000, 1281),
    ],
)
def test_ict_doubles_its_grid(step, scales):
    assert ict_scales(step, 400_000, s0=10, s1=1280) == scales


def test_curricula_survive_short_runs():
    assert [ict_scales(k, 4, 10, 1280) for k in range(4)] == [11, 21, 41, 81]
    assert [ct_scales(k, 1, 2, 150) for k in range(2)] == [2, 151]


def test_ict_draws_and_weighs_its_bins():
    sigmas = karras_sigmas(11).flip(0)
    law = lognormal_bins(sigmas, -1.1, 2.0)
    expected = [0.06263299, 0.18173698, 0.24550142, 0.21349445, 0.14244606, 0.08060462, 0.04107991, 0.01958009]
    torch.testing.assert_close(
        law, torch.tensor([*expected, 0.00894387, 0.00397961], dtype=torch.float64), rtol=0, atol=6e-9
    )
    weights = [67.9313065, 14.6270577, 4.28823664, 1.54527588, 0.645243694, 0.300866919, 0.152843769, 0.0831478744]
    expected = torch.tensor([*weights, 0.0478345484, 0.0288298545], dtype=torch.float64)
    torch.testing.assert_close(inverse_gap(sigmas.diff()), expected, rtol=2e-9, atol=0)


@pytest.mark.parametrize("law", [lognormal_bins(karras_sigmas(11).flip(0), -1.1, 2.0), uniform_bins(torch.ones(41))])
def test_indices_follow_their_law(law):
    uniform = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    share = draw_bins(law, uniform).bincount(minlength=len(law)) / len(uniform)
    torch.testing.assert_close(share, law.float(), rtol=0, atol=2e-6)
    assert draw_bins(law, torch.tensor([0.0, 1 - 1e-7])).tolist() == [0, len(law) - 1]


def test_a_number_at_the_edge_of_two_bins_is_the_next_one_s():
    """The bins [0, 1/4), [1/4, 1/2), [1/2, 1) give uniform numbers in [0, 1) exactly the bins' law."""
    law = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.25 - 2**-26, 0.25, 0.5 - 2**-25, 0.5, 1 - 2**-24])
    assert draw_bins(law, uniform).tolist() == [0, 0, 1, 1, 2, 2]


def test_bins_of_no_probability_are_never_drawn():
    law = torch.tensor([0.0, 0.5, 0.0, 0.5], dtype=torch.float64)
    assert draw_bins(law, torch.tensor([0.0, 0.25, 0.5, 0.75])).tolist() == [1, 1, 3, 3]


def test_the_last_bin_is_drawn_where_the_sums_of_the_law_fall_short_of_1():
    law = torch.full((10,), 0.1, dtype=torch.float64)
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)  # below 1
    assert law.cumsum(0)[-1] <= largest
    assert draw_bins(law, largest).tolist() == [9]


def test_karras_weight_is_that_of_edm():
    sigma = torch.tensor([0.002, 0.02, 0.5, 80.0], dtype=torch.float64)
    torch.testing.assert_close(karras_weight(sigma, 0.5), edm_weight(sigma, 0.5))
    torch.testing.assert_close(snr_weight(sigma) * sigma**2, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("law", [uniform_bins, partial(lognormal_bins, mean=-1.1, std=2.0)])
def test_levels_are_drawn_from_their_grid(law):
    uniform = Draws(0, 0, range(1000)).uniform("sigma")
    u, t = draw_levels(law, 18, 0.002, 80.0, uniform)
    sigmas = karras_sigmas(18, 0.002, 80.0).flip(0)
    bins = draw_bins(law(sigmas), uniform)
    assert torch.equal(u, sigmas[bins]) and torch.equal(t, sigmas[bins + 1])


def test_levels_are_drawn_without_a_copy_from_the_host():
    """A copy to a GPU would wait for the work in its queue. "meta" stands for the GPU."""
    for step in range(2):
        uniform = Draws(0, step, range(8), "meta").uniform("sigma")
        with Dispatched() as dispatched:
            u, t = draw_levels(uniform_bins, 18, 0.002, 80.0, uniform)
        assert u.device.type == t.device.type == "meta"
        assert ({"cpu", "meta"} in dispatched.devices) is (step == 0)
    assert dispatched.devices and all(devices == {"meta"} for devices in dispatched.devices)
