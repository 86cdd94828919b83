"""The search, against functions with known minima."""

import math

import pytest

from cm_diffusers.core.golden_section import GOLDEN, golden_section, search_levels


@pytest.mark.parametrize("place", [0.0, 0.3, 2.0, 4.999, 5.0])
@pytest.mark.parametrize("shape", [lambda x: x**2, lambda x: abs(x) ** 0.5, lambda x: abs(x) + (x > 0)])
def test_golden_section_finds_the_minimum(place, shape):
    found, value = golden_section(lambda x: shape(x - place) + 7, 0, 5, 1e-3)
    assert abs(found - place) <= 1e-3 and value == shape(found - place) + 7


def test_each_call_divides_the_interval_by_the_golden_ratio():
    calls = []

    def f(x):
        calls.append(x)
        return (x - 1.7) ** 2

    golden_section(f, 0, 5, 0.01)
    assert len(calls) == len(set(calls)) == 2 + math.ceil(math.log(0.01 / 5) / math.log(GOLDEN))
    assert all(0 < x < 5 for x in calls)


def bowl(best):
    """A distance with its minimum, 1, at the levels `best`; the best value of each level depends on the others."""

    def distance(sigmas):
        assert sigmas[0] == 80 and all(a > b > 0.01 for a, b in zip(sigmas, sigmas[1:]))
        gaps = [math.log(sigma / at) for sigma, at in zip(sigmas[1:], best)]
        return 1 + sum(gap**2 for gap in gaps) + 0.3 * sum(a * b for a, b in zip(gaps, gaps[1:]))

    return distance


@pytest.mark.parametrize("best", [[0.8], [6.0, 0.5], [12.0, 2.0, 0.3]])
def test_levels_are_found_one_after_the_other(best):
    start = [80, 20, 5, 1][: len(best) + 1]
    sigmas, value = search_levels(bowl(best), start, 0.01, tolerance=0.02, sweeps=6)
    assert sigmas[0] == 80 and sigmas[1:] == pytest.approx(best, rel=0.05)
    assert value == bowl(best)(sigmas) < bowl(best)(start)
    assert all(float(f"{sigma:.4g}") == sigma for sigma in sigmas)


def test_levels_that_are_best_already_are_kept():
    assert search_levels(bowl([0.8]), [80, 0.8], 0.01) == ([80, 0.8], 1)
