"""A folder for one process at a time."""

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from cm_diffusers.engine.places import make_folder


LOCK = ".lock"  # the file in its folder that a run holds while it lives


def lock_folder(folder: Path) -> FileLock:
    """Take a folder for this process. The system frees it when the process ends, however it ends."""
    make_folder(folder)
    lock, owner = FileLock(folder / LOCK), folder / ".owner"
    try:
        lock.acquire(timeout=1)  # evaluate.py --watch holds it for a moment, to see whether it is free
    except Timeout:
        by = owner.read_text() if owner.exists() else "another process"
        raise ValueError(f"output_dir {str(folder)!r} is in use by {by}; choose another, or stop that run.") from None
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def is_locked(folder: Path) -> bool:
    """Whether a process has taken the folder."""
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
