"""The log of a run: a line of JSON for the steps since the last one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm_diffusers.engine.files import parse_json, read_plain


MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Log:
    """Rows in rising steps; how many other lines are damaged; whether the last line was cut off, as by a kill."""

    rows: list[dict[str, Any]]
    damaged: int
    cut: bool


def read_log(file: Path, last: int = (1 << 53) - 1) -> Log:
    """The log up to the step `last`. Raises OSError or ValueError as `read_plain` does."""
    rows, bad = [], []
    lines = read_plain(file, limit=MOST_BYTES).removesuffix(b"\n").split(b"\n")
    for i, line in enumerate(lines if lines != [b""] else []):
        try:
            row = parse_json(line)
            step = row["step"]
            if type(step) is not int or not (rows[-1]["step"] if rows else 0) < step:
                raise ValueError("no step after the last one")
            if step <= last:
                rows.append(row)
        except (ValueError, TypeError, KeyError):
            bad.append(i)
    cut = bad[-1:] == [len(lines) - 1]
    return Log(rows, len(bad) - cut, cut)
