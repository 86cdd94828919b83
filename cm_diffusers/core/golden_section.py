"""Minima by golden-section search: of one variable, and of noise levels one after another."""

import math
from collections.abc import Callable, Sequence


GOLDEN = (math.sqrt(5) - 1) / 2  # 0.618, the share of the interval that remains after each evaluation


def golden_section(f: Callable[[float], float], low: float, high: float, tolerance: float) -> tuple[float, float]:
    """The minimiser of `f` and its value there (Kiefer 1953, https://doi.org/10.1090/S0002-9939-1953-0055639-3).

    Args:
        f: a function that falls to one minimum in [low, high] and then rises. It is called only inside (low, high).
        low, high: the interval.
        tolerance: largest distance of the result from the minimiser; each call divides the interval by 1.618.
    """
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    f_left, f_right = f(left), f(right)
    while high - low > tolerance:
        if f_left <= f_right:  # the minimum is not in [right, high]
            high, right, f_right = right, left, f_left
            left = high - GOLDEN * (high - low)
            f_left = f(left)
        else:
            low, left, f_left = left, right, f_right
            right = low + GOLDEN * (high - low)
            f_right = f(right)
    return min((f_left, left), (f_right, right))[::-1]


def search_levels(
    distance: Callable[[list[float]], float],
    sigmas: Sequence[float],
    lowest: float,
    tolerance: float = 0.1,
    sweeps: int = 2,
) -> tuple[list[float], float]:
    """Minimise `distance` over all levels but the first; returns the best levels and their distance.

    The levels are searched one after another, in ln sigma.

    Args:
        distance: a function of decreasing levels. It must return the same number for the same levels.
        sigmas: the initial levels. The first one stays, the others stay unless the search finds better ones.
        lowest: a bound below all levels.
        tolerance: that of `golden_section`, in ln sigma.
        sweeps: passes over the levels. One searched level gets one pass, because no other level moves.
    """
    sigmas = list(sigmas)
    least = distance(sigmas)
    for _ in range(sweeps if len(sigmas) > 2 else 1):
        for i in range(1, len(sigmas)):
            found, value = _best_level(distance, sigmas, i, lowest, tolerance)
            if value < least:
                sigmas[i], least = found, value
    return sigmas, least


def _best_level(
    distance: Callable[[list[float]], float], sigmas: list[float], i: int, lowest: float, tolerance: float
) -> tuple[float, float]:
    """The level at index `i`, between its neighbours, that minimises `distance`, and its distance."""

    def level(log_sigma: float) -> float:
        return float(f"{math.exp(log_sigma):.4g}")

    def distance_at(log_sigma: float) -> float:
        return distance([*sigmas[:i], level(log_sigma), *sigmas[i + 1 :]])

    low, high = math.log([*sigmas, lowest][i + 1]), math.log(sigmas[i - 1])
    place, value = golden_section(distance_at, low, high, tolerance)
    return level(place), value
