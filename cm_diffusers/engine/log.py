"""The log of a run: a line of JSON for the steps since the last one."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm_diffusers.engine.files import free_name, holds, parse_json, read_plain, replace_file


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


def cut_log(file: Path, step: int, expected: bool) -> Iterator[str]:
    """Drop the lines after `step`, a line that a kill cut off, and damaged ones; gives what there is to say of it.

    Args:
        file: the log, which may be missing.
        step: where the run goes on.
        expected: whether a run that has come so far has written a line.
    """
    log = read_log(file, step) if file.exists() else Log([], 0, False)
    text = "".join(json.dumps(row) + "\n" for row in log.rows)
    damaged = log.damaged + (log.cut and not log.rows)
    if damaged:
        copy = free_name(file)
        shutil.copyfile(file, copy)
        yield f"WARNING: {damaged} damaged line(s) of {file} are left out; {copy.name} is as it was."
    if expected and not log.rows:
        yield f"{file} holds no line up to step {step}: its curves begin there."
    if file.exists() and not holds(file, text):
        replace_file(file, text)
