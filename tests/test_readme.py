from pathlib import Path

from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.objectives.table import method_table


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_table_of_methods_is_that_of_the_code():
    assert method_table() in README, "put in what `python -m cm_diffusers.objectives.table` prints"


def test_every_method_has_a_row():
    assert all(f"| `{name}` |" in method_table() for name in OBJECTIVES)
