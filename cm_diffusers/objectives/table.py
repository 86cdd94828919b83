"""The tables of methods in docs/methods.md and, shorter, in the README: `python -m cm_diffusers.objectives.table`."""

from collections.abc import Collection

from cm_diffusers.objectives import OBJECTIVES, Objective
from cm_diffusers.objectives.options import TeacherOptions


SHORT = ("method", "what", "teacher", "paper")  # columns of the README's table


def method_table(columns: Collection[str] | None = None) -> str:
    """A Markdown table with a row for each method, from the declarations of its class.

    `columns` are the names of the columns to include; None includes all.
    """
    cells = [_cells(cls) for cls in OBJECTIVES.values()]
    cells = [{name: text for name, text in row.items() if columns is None or name in columns} for row in cells]
    rows = [list(cells[0]), ["---"] * len(cells[0]), *(list(row.values()) for row in cells)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cells(cls: type[Objective]) -> dict[str, str]:
    """The row of a method: its cells by the titles of their columns."""
    text, teacher = cls.summary, "no"
    if issubclass(cls.Options, TeacherOptions):
        teacher = text.teacher + ("" if cls.needs_teacher else ", or none")
    return {
        "method": f"`{cls.name}`",
        "what": text.what,
        "teacher": teacher,
        "target": text.target,
        "times": text.times,
        "distance": text.distance,
        "weight": text.weight,
        "paper": text.paper,
        "jvp": "yes" if cls.needs_tangents else "no",
    }


if __name__ == "__main__":
    print(method_table(), method_table(SHORT), sep="\n", end="")
