"""The examples in docstrings are run as they stand."""

import doctest

import pytest

import cm_diffusers


CLASSES = [getattr(cm_diffusers, name) for name in cm_diffusers.__all__ if name.endswith(("Pipeline", "Scheduler"))]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_pipeline_and_scheduler_has_an_example_that_runs(cls):
    example = doctest.DocTestParser().get_doctest(cls.__doc__, {}, cls.__name__, None, None)
    assert any(cls.__name__ in line.source for line in example.examples)
    said = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)
