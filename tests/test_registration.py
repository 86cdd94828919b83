"""diffusers finds the library's classes, whichever of the two is imported first."""

import subprocess
import sys
from types import ModuleType

import pytest

import cm_diffusers
from cm_diffusers import registration


OURS_FIRST = """
import importlib.util, sys
import cm_diffusers
assert not {"torch", "diffusers"} & sys.modules.keys()
assert importlib.util.find_spec("diffusers") is not None  # as transformers and accelerate look for it
assert "diffusers" not in sys.modules
import diffusers
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "cm_diffusers.registration"]
assert diffusers.CTMPipeline is cm_diffusers.CTMPipeline
assert diffusers.pipelines.cm_diffusers is cm_diffusers
from cm_diffusers import *
assert CTMPipeline.__module__ == TwoTimeModel.__module__ == TrigFlowScheduler.__module__ == "cm_diffusers"
"""


def test_importing_the_library_imports_nothing_slow_and_diffusers_learns_of_it_later():
    subprocess.run([sys.executable, "-c", OURS_FIRST], check=True)


def test_names_that_nobody_has_are_refused():
    import diffusers

    with pytest.raises(AttributeError, match="NoSuchPipeline"):
        diffusers.NoSuchPipeline  # noqa: B018
    with pytest.raises(AttributeError, match="module 'cm_diffusers' has no attribute 'NoSuchModel'"):
        cm_diffusers.NoSuchModel  # noqa: B018
    assert {"CTMPipeline", "EDMUNet2DModel", "__version__"} <= set(dir(cm_diffusers))


def test_names_of_diffusers_go_before_ours_and_a_module_is_registered_once():
    stock = ModuleType("stock")
    stock.pipelines, stock.CTMPipeline = ModuleType("pipelines"), "theirs"
    for _ in range(2):
        registration.register(stock, cm_diffusers, ["CTMPipeline", "MeanFlowPipeline"])
    assert stock.CTMPipeline == "theirs" and stock.MeanFlowPipeline is cm_diffusers.MeanFlowPipeline
    assert stock.pipelines.cm_diffusers is cm_diffusers and len(type(stock).__mro__) == 4
