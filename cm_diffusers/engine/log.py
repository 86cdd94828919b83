"""The log of a run: each line is JSON for the training steps since the previous line."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm_diffusers.engine.files import free_name, holds, parse_json, read_plain, replace_file


MOST_BYTES = 1 << 30  # size limit of a log


@dataclass(frozen=True)
class Log:
    """The content of a log file.

    Args:
        rows: the valid lines, in the order of their steps.
        damaged: the number of other lines, without a last line that was cut off.
        cut: whether the last line was cut off, for example by a kill.
    """

    rows: list[dict[str, Any]]
    damaged: int
    cut: bool


def read_log(file: Path, last: int = (1 << 53) - 1) -> Log:
    """Read the log in `file` up to the step `last`.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a regular file, or too large.
    """
    rows, bad = [], []
    lines = read_plain(file, limit=MOST_BYTES).removesuffix(b"\n").split(b"\n")
    for i, line in enumerate(lines if lines != [b""] else []):
        try:
            row = parse_json(line)
            step = row["step"]
            if type(step) is not int or not (rows[-1]["step"] if rows else 0) < step:
                raise ValueError("its step does not follow the last one")
            if step <= last:
                rows.append(row)
        except (ValueError, TypeError, KeyError):
            bad.append(i)
    cut = bad[-1:] == [len(lines) - 1]
    return Log(rows, len(bad) - cut, cut)


def cut_log(file: Path, step: int, expected: bool) -> Iterator[str]:
    """Remove from a log the lines after `step` and damaged lines, and yield messages about that.

    A last line that a kill cut off is removed without a message, unless there is no other line.

    Args:
        file: the log, which can be missing.
        step: the step from which the run continues.
        expected: whether a run at `step` has written a line.
    """
    log = read_log(file, step) if file.exists() else Log([], 0, False)
    text = "".join(json.dumps(row) + "\n" for row in log.rows)
    damaged = log.damaged + (log.cut and not log.rows)
    if damaged:
        copy = free_name(file)
        shutil.copyfile(file, copy)
        yield f"WARNING: {damaged} damaged line(s) of {file} are removed. {copy.name} is a copy of the damaged log."
    if expected and not log.rows:
        yield f"{file} holds no line up to step {step}, so its curves begin at that step."
    if file.exists() and not holds(file, text):
        replace_file(file, text)
