"""Checks of the files in the folder of a run, except its checkpoints, before the run reads them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.files import RunFiles, kind_of, read_json, set_aside, why
from cm_diffusers.engine.settings_files import read_yaml
from cm_diffusers.engine.sharing.card import read_facts, read_metrics
from cm_diffusers.engine.training.divergence import check_note
from cm_diffusers.engine.training.tracking import read_note as read_tracker


def _of(kind: type, read: Callable[[Path], Any]) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        if not isinstance(value := read(path), kind):
            raise ValueError(f"holds {value!r:.40} instead of a {kind.__name__}")

    return check


# a check for each file, which raises an error for content that no run has written; None if only its reader can tell
FILES: dict[str, Callable[[Path], Any] | None] = {
    RunFiles.SETTINGS: _of(dict, read_yaml),
    RunFiles.DATA: lambda path: DataDescription.from_dict(read_json(path)),
    RunFiles.FACTS: read_facts,
    RunFiles.METRICS: read_metrics,
    RunFiles.EXPORTED: _of(list, read_json),
    RunFiles.DIVERGED: check_note,
    RunFiles.TRACKER: read_tracker,
    RunFiles.LOG: None,
    RunFiles.CURVES: None,
    RunFiles.QUALITY: None,
    RunFiles.SCANNED: None,
    RunFiles.LATENTS: None,
}
FOLDERS = (RunFiles.PICTURES, RunFiles.MODEL, RunFiles.TRACKERS, RunFiles.TEXT)
# files that a run overwrites at its start, during training, or at its end
OVERWRITTEN = (RunFiles.SETTINGS, RunFiles.MODEL, RunFiles.CURVES, RunFiles.DATA, RunFiles.FACTS)
# any of these marks a folder as that of a run
MARKS = ("checkpoint-*", "*-checkpoint-*", RunFiles.LOG, RunFiles.EXPORTED, RunFiles.OWNER)


def check_ours(folder: Path) -> None:
    """Check that a run in `folder` overwrites no foreign files.

    Raises:
        ValueError: the folder is not that of a run, but holds files with names that a run overwrites.
    """
    theirs = [name for name in OVERWRITTEN if os.path.lexists(folder / name)]
    if theirs and not any(any(folder.glob(mark)) for mark in MARKS):
        raise ValueError(
            f"output_dir {str(folder)!r} is not the folder of a run, but holds {', '.join(theirs)}, which a run would"
            " overwrite. Give another folder."
        )


def look_over(folder: Path) -> list[str]:
    """Rename damaged files and folders of the run in `folder` to damaged-NAME, and return a warning for each.

    The run writes them again.
    """
    faults = {name: _fault(folder / name, check) for name, check in FILES.items()}
    faults |= {name: None if (folder / name).is_dir() else "is not a folder" for name in FOLDERS}
    return [
        f"WARNING: {folder / name} {fault}. It is renamed to {set_aside(folder / name).name}, and written again."
        for name, fault in faults.items()
        if fault is not None and os.path.lexists(folder / name)
    ]


def _fault(path: Path, check: Callable[[Path], Any] | None) -> str | None:
    """The fault of a file, to continue a message after its name; None without a fault."""
    try:
        kind = kind_of(os.stat(path).st_mode)
        if kind is not None:
            return f"is {kind} instead of a file"
        if check is not None:
            check(path)
    except FileNotFoundError:  # or there is no file; `look_over` leaves that out
        return "is a link that leads nowhere"
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        return why(error)
    return None
