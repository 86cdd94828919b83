"""What lies in the folder of a run beside its checkpoints, looked over before a run reads any of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cm_diffusers.engine.data.description import FILE as DATA
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.files import kind_of, read_json, set_aside, why
from cm_diffusers.engine.lock import OWNER
from cm_diffusers.engine.settings_files import read_yaml
from cm_diffusers.engine.sharing.card import FACTS, METRICS, read_facts, read_metrics
from cm_diffusers.engine.training.divergence import NOTE as DIVERGED
from cm_diffusers.engine.training.divergence import check_note
from cm_diffusers.engine.training.tracking import NOTE as TRACKER
from cm_diffusers.engine.training.tracking import read_note as read_tracker


EXPORTED = "exported.json"  # what the saved model is an export of


def _of(kind: type, read: Callable[[Path], Any]) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        if not isinstance(value := read(path), kind):
            raise ValueError(f"holds {value!r:.40} where a {kind.__name__} belongs")

    return check


# files with what raises an error for another content than a run's; None where only the reader of the file can tell
FILES: dict[str, Callable[[Path], Any] | None] = {
    "config.yaml": _of(dict, read_yaml),
    DATA: lambda path: DataDescription.from_dict(read_json(path)),
    FACTS: read_facts,
    METRICS: read_metrics,
    EXPORTED: _of(list, read_json),
    DIVERGED: check_note,
    TRACKER: read_tracker,
    "log.jsonl": None,
    "losses.png": None,
    "quality.png": None,
    "images_checked.safetensors": None,
    "latents.safetensors": None,
}
FOLDERS = ("samples", "pipeline", "tracker")
OVERWRITTEN = ("config.yaml", "pipeline", "losses.png", DATA, FACTS)  # at the start, while it trains, at the end
MARKS = ("checkpoint-*", "*-checkpoint-*", "log.jsonl", EXPORTED, OWNER)  # each says that a folder is that of a run


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
