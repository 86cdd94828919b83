"""Start and end the processes of a run: the accelerator, shared errors, and error messages."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cm_diffusers.engine.files import GOES_ON, explain
from cm_diffusers.parent import parent
from cm_diffusers.scripts import LAUNCHED_BY


PATIENCE = 20.0  # seconds in which a launcher ends the other processes after one has failed


def start_accelerator(**settings: Any) -> Accelerator:
    """Create `Accelerator(**settings)` for all launched processes, on the CPU if there is no other device.

    Raises:
        ValueError: the launched processes do not form one group, for example with --multi_gpu on a machine without
            GPUs. Each process would run the whole job.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    by_launcher = launched > 1 and "LOCAL_RANK" in os.environ
    accelerator = Accelerator(cpu=by_launcher and not torch.accelerator.is_available(), **settings)
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate knows of {accelerator.num_processes}. Start them with"
            f" torchrun --nproc_per_node {launched}, or with cm-diffusers --num_processes {launched}."
        )
    return accelerator


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A context for work of the main process alone: if it fails, the others end as well instead of waiting for it.

    All processes enter the context.

    Raises:
        Exception: the error of the block, on the process where it occurs.
        ValueError: on the other processes, with the message of the main process's error.
    """
    fault = None
    try:
        yield
    except Exception as error:
        fault = error
    if accelerator.num_processes > 1:
        [text] = broadcast_object_list([fault and (explain(fault) or str(fault) or type(fault).__name__)])
        if text and not fault:
            raise ValueError(text)
    if fault:
        raise fault


def agreed(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """The logical or of each flag over all processes, the same on every process."""
    if accelerator.num_processes == 1:
        return list(flags)
    return (accelerator.reduce(torch.tensor(flags, device=accelerator.device).float()) > 0).tolist()


@contextmanager
def ends_with_a_line(flag: str = "--output_dir", then: str = GOES_ON) -> Iterator[None]:
    """A context in which user errors (ValueError) and system errors end the program with a message and exit code 2.

    If the environment variable CM_DIFFUSERS_TRACEBACK is set, these errors are raised with their traceback instead.

    Args:
        flag: the option that names the output folder.
        then: what the user can do after the repair of a system error, as a clause.
    """
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else explain(error, flag, then)
        if int(os.environ.get("RANK", 0)) > 0 and isinstance(error, RuntimeError) and "by peer" in str(error):
            text = "another process has ended, and its message tells the cause."
        if text is None or os.environ.get("CM_DIFFUSERS_TRACEBACK"):
            raise
        end_with(text)


def end_with(error: Exception | str) -> NoReturn:
    """End the program with the message `error` and exit code 2. Several processes print it once.

    All but the main process first wait `PATIENCE` seconds, because the launcher ends them if the main one has failed.

    Raises:
        SystemExit: always.
    """
    number = int(os.environ.get("RANK", 0))
    if number > 0:
        time.sleep(PATIENCE)
    line = f"error: {error}" + (f" (process {number})" if number > 0 else "")
    if not _says_it_behind_the_launcher(line):
        with suppress(OSError):  # stderr can go to a full disk
            print(line, file=sys.stderr, flush=True)
    raise SystemExit(2) from None


SAYS = """
import psutil, sys, time

end = time.monotonic() + {patience}
try:
    launcher = psutil.Process({pid})
    while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.02)
except psutil.Error:  # the launcher is gone
    pass
print({line!r}, file=sys.stderr)
"""


def _says_it_behind_the_launcher(line: str) -> bool:
    """Print a line from another process after the end of the launcher, which prints about 40 lines of its own.

    False without such a launcher. The launcher of `cm-diffusers --num_processes` prints nothing itself.
    """
    try:
        launcher = psutil.Process(parent())
        words = " ".join(launcher.cmdline())
        if os.environ.get(LAUNCHED_BY) or not re.search(r"torchrun|torch\.distributed|accelerate", words):
            return False
        says = SAYS.format(pid=launcher.pid, patience=PATIENCE, line=line)
        subprocess.Popen([sys.executable, "-c", says], stdin=subprocess.DEVNULL, start_new_session=True)
    except (psutil.Error, OSError):
        return False
    return True
