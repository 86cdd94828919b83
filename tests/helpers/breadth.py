"""How broad a test is: some of its cases stand for all where time counts, and continuous integration has all."""

from collections.abc import Iterable

import pytest


def narrowed(cases: Iterable, *kept) -> list:
    """Parameters of a test, of which `make test` has only those that are `kept`; the others are marked as `wide`."""
    cases = list(cases)
    assert set(kept) <= set(cases), "a case that is kept must be one"
    return [case if case in kept else _wide(case) for case in cases]


def _wide(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.wide)
