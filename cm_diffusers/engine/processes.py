"""Accelerate's view of the processes, checked against the launcher's, and how they end."""

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


PATIENCE = 20.0  # seconds, in which a launcher ends the other processes once one has failed


def start_accelerator(**settings: Any) -> Accelerator:
    """An `Accelerator(**settings)` of all the processes that were launched, on the CPU where there is nothing else.

    Raises:
        ValueError: they would not know of each other, and each would do all.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    by_launcher = launched > 1 and "LOCAL_RANK" in os.environ
    accelerator = Accelerator(cpu=by_launcher and not torch.accelerator.is_available(), **settings)
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, and Accelerate knows of {accelerator.num_processes}. Start them by"
            f" torchrun --nproc_per_node {launched}, or by cm-diffusers with --num_processes {launched}."
        )
    return accelerator


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Where the main process fails in what it does alone, the others end as well, instead of waiting for it.

    Raises the error on the main process, and on the others a ValueError with its message.
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
    """Each flag, true on all processes where it is on one."""
    if accelerator.num_processes == 1:
        return list(flags)
    return (accelerator.reduce(torch.tensor(flags, device=accelerator.device).float()) > 0).tolist()


@contextmanager
def ends_with_a_line(flag: str = "--output_dir", then: str = GOES_ON) -> Iterator[None]:
    """Errors of the user, and faults of the system, end the program by a message and code 2.

    The environment's CM_DIFFUSERS_TRACEBACK shows where they come from.

    Args:
        flag: what names the folder that the program writes to.
        then: what can be done once the fault of the system is repaired.
    """
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else explain(error, flag, then)
        if int(os.environ.get("RANK", 0)) > 0 and isinstance(error, RuntimeError) and "by peer" in str(error):
            text = "another process has ended; its message says why."
        if text is None or os.environ.get("CM_DIFFUSERS_TRACEBACK"):
            raise
        end_with(text)


def end_with(error: Exception | str) -> NoReturn:
    """End the program by a message and code 2; several processes print it once.

    Others than the main process wait first, as the launcher ends them where the main one has failed as well.
    """
    number = int(os.environ.get("RANK", 0))
    if number > 0:
        time.sleep(PATIENCE)
    line = f"error: {error}" + (f" (process {number})" if number > 0 else "")
    if not _says_it_behind_the_launcher(line):
        with suppress(OSError):  # where stderr goes to a full disk as well
            print(line, file=sys.stderr, flush=True)
    raise SystemExit(2) from None


SAYS = """
import psutil, sys, time

end = time.monotonic() + {patience}
try:
    launcher = psutil.Process({pid})
    while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.02)
except psutil.Error:  # it is gone
    pass
print({line!r}, file=sys.stderr)
"""


def _says_it_behind_the_launcher(line: str) -> bool:
    """Let another process say a line once the launcher has ended, which itself has some 40 lines to say of it.

    False where there is no such launcher: that of `cm-diffusers --num_processes` is quiet.
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
