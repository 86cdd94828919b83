"""The examples in docstrings run unchanged."""

import doctest

import pytest

import cm_diffusers
from cm_diffusers.objectives import OBJECTIVES


CLASSES = [getattr(cm_diffusers, name) for name in cm_diffusers.__all__ if name.endswith(("Pipeline", "Scheduler"))]


def run_the_example_of(cls):
    example = doctest.DocTestParser().get_doctest(cls.__doc__, {}, cls.__name__, None, None)
    assert any(cls.__name__ in line.source for line in example.examples)
    said = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_pipeline_and_scheduler_has_an_example_that_runs(cls):
    run_the_example_of(cls)


@pytest.mark.parametrize("cls", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_every_objective_has_an_example_that_trains(cls):
    run_the_example_of(cls)
    assert ".backward()" in cls.__doc__
