"""Checks of output folders and devices, made before a script starts work that it could lose."""

import os
import re
from pathlib import Path

import torch


def make_folder(folder: Path, flag: str = "output_dir") -> Path:
    """Create a folder with its parents, and return it.

    Args:
        folder: the folder; it may exist.
        flag: the option that names the folder, for messages.

    Raises:
        ValueError: the folder can't be created or written to.
    """
    check_place(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {str(folder)!r} can't be created ({error.strerror}). Give another folder.") from None
    return folder


def check_place(folder: Path, flag: str = "output_dir") -> None:
    """Check that `folder` is a writable folder or can be created, without creating it.

    Args:
        folder: the folder; it may be missing.
        flag: the option that names the folder, for messages.

    Raises:
        ValueError: `folder` or one of its parents is a file, or is not writable.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{flag} {str(folder)!r} can't be a folder: {there} is a file. Give another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {str(folder)!r} is not writable. Allow writing in {there}, or give another folder.")


def earlier_files(folder: Path, made: str, overwrite: bool) -> list[Path]:
    """The output files of an earlier call in `folder`, to be deleted before new ones are written.

    Args:
        folder: the output folder; it may be missing.
        made: a regular expression for the names of the script's own output files.
        overwrite: whether these files may be deleted; other files never are.

    Raises:
        ValueError: the folder holds other files, or files of an earlier call without `overwrite`.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    foreign = [path for path in files if not re.fullmatch(made, path.name)]
    if foreign:
        raise ValueError(
            f"{folder} holds files that this script did not write, such as {foreign[0].name}. Give another"
            " --output_dir."
        )
    if files and not overwrite:
        number = f"{len(files)} file{'s' * (len(files) > 1)}"
        raise ValueError(
            f"{folder} holds {number} of an earlier call. Give another --output_dir, or add --overwrite to delete them"
            " first."
        )
    return files


def find_device(name: str) -> torch.device:
    """The torch device called `name`, such as "cpu" or "cuda:0", after a test allocation.

    Raises:
        ValueError: the device can't be used here; the message lists the available devices.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the type depends on the backend
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device {name!r} can't be used here ({reason}). Available: {', '.join(here)}.") from None
    return device
