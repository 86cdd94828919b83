"""The method of docs/add_a_method.md, which is not part of the package."""

import re
import sys
from pathlib import Path
from types import ModuleType

from cm_diffusers.objectives import OBJECTIVES


PAGE = Path(__file__).parents[2] / "docs/add_a_method.md"
SCRIPT, TEST = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
(RECIPE,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def _module(name: str, code: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


Halving = _module("halving", SCRIPT).Halving
del OBJECTIVES[Halving.name]  # tests register it where they need it
page_s_test = _module("test_halving", TEST).test_a_consistent_function_has_no_loss
