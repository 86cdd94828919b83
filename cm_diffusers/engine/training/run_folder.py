"""What lies in the folder of a run beside its checkpoints, looked over before a run reads any of it."""

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
            raise ValueError(f"holds {value!r:.40} where a {kind.__name__} belongs")

    return check


# files with what raises an error for another content than a run's; None where only the reader of the file can tell
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
FOLDERS = (RunFiles.PICTURES, RunFiles.MODEL, RunFiles.TRACKERS)
# at the start, while it trains, at the end
OVERWRITTEN = (RunFiles.SETTINGS, RunFiles.MODEL, RunFiles.CURVES, RunFiles.DATA, RunFiles.FACTS)
# each says that a folder is that of a run
MARKS = ("checkpoint-*", "*-checkpoint-*", RunFiles.LOG, RunFiles.EXPORTED, RunFiles.OWNER)


def check_ours(folder: Path) -> None:
    """Raise ValueError where a run would write over files that no run has left there."""
    theirs = [name for name in OVERWRITTEN if os.path.lexists(folder / name)]
    if theirs and not any(any(folder.glob(mark)) for mark in MARKS):
        raise ValueError(
            f"output_dir {str(folder)!r} is not the folder of a run and holds {', '.join(theirs)}, which a run would"
            " write over; give another folder."
        )


def look_over(folder: Path) -> list[str]:
    """Rename what is not what a run has left to damaged-NAME; lines that say so. A run makes it anew."""
    faults = {name: _fault(folder / name, check) for name, check in FILES.items()}
    faults |= {name: None if (folder / name).is_dir() else "is not a folder" for name in FOLDERS}
    return [
        f"WARNING: {folder / name} {fault}; it is renamed to {set_aside(folder / name).name}, and made anew."
        for name, fault in faults.items()
        if fault is not None and os.path.lexists(folder / name)
    ]


def _fault(path: Path, check: Callable[[Path], Any] | None) -> str | None:
    """What is wrong with what lies there in the place of a file."""
    try:
        kind = kind_of(os.stat(path).st_mode)
        if kind is not None:
            return f"is {kind} instead of a file"
        if check is not None:
            check(path)
    except FileNotFoundError:  # or nothing is there at all
        return "is a link that leads nowhere"
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        return why(error)
    return None
