"""Where a script works: folders that can be written, devices that are there; known before there is work to lose."""

import os
from pathlib import Path

import torch


def make_folder(folder: Path, flag: str = "output_dir") -> Path:
    """Make a folder, and give it. Raises ValueError, naming the `flag`, where there can't be one to write in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{flag} {str(folder)!r} is a file; give a folder.") from None
    except OSError as error:
        raise ValueError(f"{flag} {str(folder)!r} can't be made ({error.strerror}); give another folder.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {str(folder)!r} can't be written; give another folder.")
    return folder


def empty_folder(folder: Path, overwrite: bool) -> Path:
    """Make a folder without files, and give it.

    Raises:
        ValueError: it holds files, and may not be emptied; or it can't be made.
    """
    make_folder(folder)
    files = [path for path in folder.iterdir() if path.is_file() or path.is_symlink()]
    if files and not overwrite:
        raise ValueError(
            f"{str(folder)!r} holds {len(files)} files of an earlier call, as {files[0].name}. Give another"
            " --output_dir, or --overwrite to delete them first."
        )
    for path in files:
        path.unlink()
    return folder


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
