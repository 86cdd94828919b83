"""Where a script works: folders that can be written, devices that are there; known before there is work to lose."""

import os
import re
from pathlib import Path

import torch


def make_folder(folder: Path, flag: str = "output_dir") -> Path:
    """Make a folder, and give it. Raises ValueError, naming the `flag`, where there can't be one to write in."""
    check_place(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {str(folder)!r} can't be made ({error.strerror}); give another folder.") from None
    return folder


def check_place(folder: Path, flag: str = "output_dir") -> None:
    """Raise ValueError where `folder` neither is nor can become one to write in. Makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{flag} {str(folder)!r} can't be a folder: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {str(folder)!r} can't be written: allow writing in {there}, or give another.")


def earlier_files(folder: Path, made: str, overwrite: bool) -> list[Path]:
    """The files of an earlier call in `folder`, to be deleted before new ones are written.

    Args:
        folder: which may be missing.
        made: a regular expression of the names that the script gives its files.
        overwrite: whether its own files may be deleted; others never are.

    Raises:
        ValueError: the folder holds files that would be mixed with the new ones.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    foreign = [path for path in files if not re.fullmatch(made, path.name)]
    if foreign:
        raise ValueError(f"{folder} holds other files, as {foreign[0].name}; give another --output_dir.")
    if files and not overwrite:
        number = f"{len(files)} file{'s' * (len(files) > 1)}"
        raise ValueError(
            f"{folder} holds {number} of an earlier call; give another --output_dir, or --overwrite to delete them"
            " first."
        )
    return files


def find_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError where there is none, with those that there are."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by backend
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device {name!r} can't be used here ({reason}); there is: {', '.join(here)}.") from None
    return device
