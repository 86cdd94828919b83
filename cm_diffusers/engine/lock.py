"""Locks that give the folder of a run to one process at a time."""

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from cm_diffusers.engine.files import RunFiles, kind_of, read_plain, replace_file, set_aside
from cm_diffusers.engine.places import make_folder


def lock_folder(folder: Path) -> FileLock:
    """Lock `folder` for this process, and create it if it is missing.

    The operating system releases the lock at the end of the process, even if the process is killed.

    Raises:
        ValueError: another process holds the lock, or the folder can't be created.
    """
    make_folder(folder)
    lock, owner = FileLock(folder / RunFiles.LOCK), folder / RunFiles.OWNER
    _make_way(folder / RunFiles.LOCK)
    try:
        lock.acquire(timeout=1)  # evaluate.py --watch holds it for a moment to test it
    except Timeout:
        raise ValueError(
            f"output_dir {str(folder)!r} is in use by {_read_owner(owner)}. Choose another folder, or stop that run."
        ) from None
    _make_way(owner)
    replace_file(owner, f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def _make_way(path: Path) -> None:
    """Rename `path` if it is not a file, and print a warning."""
    if os.path.lexists(path) and (kind := kind_of(os.lstat(path).st_mode)):
        tqdm.write(f"WARNING: {path} is {kind} instead of a file. It is renamed to {set_aside(path).name}.")


def _read_owner(file: Path) -> str:
    try:
        return read_plain(file, limit=1000).decode("ascii") or "another process"
    except (OSError, ValueError):
        return "another process"


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`."""
    try:
        with FileLock(folder / RunFiles.LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
