import math

import pytest
import torch

from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.noise_levels import lognormal
from cm_diffusers.core.schedules import ect_gap, ect_stage


FULL_GRIDS = {
    5: [80, 17.5278320, 2.51521898, 0.169752756, 0.002],
    10: [80, 42.4151893, 21.1086767, 9.72320136, 4.0661236, 1.50174198, 0.469979058, 0.116638564, 0.0204353346, 0.002],
    18: [
        *(80, 57.5859847, 40.7855738, 28.3745846, 19.352453, 12.9100824, 8.40093531, 5.31519452, 3.25682152),
        *(1.92333984, 1.08817064, 0.585348123, 0.296442284, 0.139516469, 0.0599473112, 0.0229345184, 0.00752801996),
        0.002,
    ],
}
ENTRIES_OF_40 = {
    **{1: 69.450946, 2: 60.117395, 5: 38.266462, 10: 16.779889, 17: 4.3655617, 18: 3.5196988, 20: 2.2404398},
    **{22: 1.3823680, 30: 0.13119736, 36: 0.010812047, 38: 0.0036765892},
}


def ect_r(t, stage, **options):
    t = torch.as_tensor(t, dtype=torch.float64)
    return t - ect_gap(t, stage, **options)


@pytest.mark.parametrize("n", FULL_GRIDS)
def test_karras_grid_has_the_published_levels(n):
    sigmas = karras_sigmas(n)
    assert sigmas.dtype == torch.float64
    torch.testing.assert_close(sigmas, torch.tensor(FULL_GRIDS[n], dtype=torch.float64), rtol=1e-8, atol=0)


def test_karras_grid_of_40_and_of_longer_grids():
    got = karras_sigmas(40)[list(ENTRIES_OF_40)]
    torch.testing.assert_close(got, torch.tensor([*ENTRIES_OF_40.values()]).double(), rtol=1e-7, atol=0)
    assert karras_sigmas(201)[106].item() == pytest.approx(1.9128436, rel=1e-7)
    assert karras_sigmas(151)[[67, 62]].tolist() == pytest.approx([3.9912186, 5.2485032], rel=1e-7)


def test_karras_grid_reaches_a_floor_of_zero():
    sigmas = karras_sigmas(10, sigma_min=0)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize(
    "stage, t, r",
    [
        *((0, 2, 0.04637662), (0, 5, 2.36614298), (0, 20, 9.99999984), (0, 80, 40.0), (1, 1, 0.21211716)),
        *((2, 0.1, 0.03999792), (7, 1, 0.98768933), (7, 0.1, 0.09812493)),
    ],
)
def test_ect_target_levels(stage, t, r):
    assert ect_r(t, stage).item() == pytest.approx(r, rel=2e-7)


def test_ect_with_q_256_at_stage_0_is_q_2_at_stage_7():
    t = torch.logspace(-3, 2, 50, dtype=torch.float64)
    assert torch.equal(ect_gap(t, 0, q=256.0), ect_gap(t, 7))


@pytest.mark.parametrize("options", [{}, {"q": 4.0, "k": 0.0}, {"k": 8.0, "b": 3.0}])
def test_ect_stage_minus_1_pulls_towards_the_data_at_every_level(options):
    t = torch.logspace(-6, 4, 200, dtype=torch.float64)
    assert (ect_r(t, -1, **options) == 0).all()


@pytest.mark.parametrize("stage, first", [(0, math.log(7)), (1, 0.510826)])
def test_ect_first_level_with_a_target_above_zero(stage, first):
    below, above = ect_r([first * (1 - 1e-5), first * (1 + 1e-5)], stage)
    assert below == 0 and above > 0


def test_ect_targets_are_above_zero_everywhere_from_stage_2_on():
    assert (ect_r(torch.logspace(-6, 4, 200, dtype=torch.float64), 2) > 0).all()


def test_ect_gap_shrinks_by_q_from_stage_to_stage():
    t = torch.logspace(-2, 2, 20, dtype=torch.float64)
    torch.testing.assert_close(ect_gap(t, 5, q=3.0), 3 * ect_gap(t, 6, q=3.0), rtol=1e-14, atol=0)


def test_ect_stages_begin_after_pretraining():
    stages = [ect_stage(step, 100, 50) for step in (0, 99, 100, 149, 150, 500)]
    assert stages == [-1, -1, 0, 0, 1, 8]


@pytest.mark.parametrize("mean, median", [(-1.2, 0.30119421), (-1.1, 0.33287108), (-1.0, 0.36787944)])
def test_lognormal_medians(mean, median):
    assert lognormal(torch.zeros((), dtype=torch.float64), mean, 1.4).item() == pytest.approx(median, rel=1e-7)


def test_lognormal_tails_of_ict():
    quantiles = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    sigma = lognormal(torch.special.ndtri(quantiles), -1.1, 2.0)
    assert (sigma > 80).double().mean().item() == pytest.approx(0.00306, abs=5e-6)
    assert (sigma < 0.002).double().mean().item() == pytest.approx(0.00527, abs=5e-6)
