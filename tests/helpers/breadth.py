"""Mark the cases of a broad test that `make test` skips; continuous integration runs all of them."""

from collections.abc import Iterable

import pytest


def narrowed(cases: Iterable, *kept) -> list:
    """Return `cases` as parameters of a test; all but the `kept` ones are marked `wide`, which `make test` skips."""
    cases = list(cases)
    assert set(kept) <= set(cases), "a case that is kept must be one"
    return [case if case in kept else _wide(case) for case in cases]


def _wide(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.wide)
