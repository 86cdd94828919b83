"""The table of methods in the README: `python -m cm_diffusers.objectives.table` prints it."""

from dataclasses import asdict

from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.objectives.base import Facts


def method_table() -> str:
    """A Markdown table with a row for each method, from the facts that its class states."""
    columns = list(Facts.__dataclass_fields__)
    rows = [["method", *columns], ["---"] * (len(columns) + 1)]
    rows += [[f"`{name}`", *asdict(cls.facts).values()] for name, cls in OBJECTIVES.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    print(method_table(), end="")
