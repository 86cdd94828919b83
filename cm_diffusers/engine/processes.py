"""Start and end the processes of a run: the accelerator, shared errors, and error messages."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor

from cm_diffusers.engine.files import GOES_ON, explain
from cm_diffusers.parent import parent
from cm_diffusers.scripts import LAUNCHED_BY


PATIENCE = 20.0  # seconds in which a launcher ends the other processes after one has failed
WAIT = timedelta(days=2)  # for work of the main process; NCCL's own ten minutes are less than one export can take
SENT_BYTES = 64 << 20  # rows that processes exchange at once


def start_accelerator(**settings: Any) -> Accelerator:
    """Create `Accelerator(**settings)` for all launched processes, on the CPU if there is no other device.

    Processes wait up to `WAIT` for each other. Distributed gradients are not copied, and buffers not broadcast: no
    network here has a buffer that depends on the data.

    Raises:
        ValueError: the launched processes do not form one group, for example with --multi_gpu on a machine without
            GPUs. Each process would run the whole job.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    by_launcher = launched > 1 and "LOCAL_RANK" in os.environ
    distributed = [
        InitProcessGroupKwargs(timeout=WAIT),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
    ]
    on_cpu = by_launcher and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=distributed, **settings)
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


class Team:
    """The processes of a run, as they share the work on its data. All of them make the same calls.

    Args:
        accelerator: the processes; None for this process alone.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator = accelerator
        self.rank, self.world = (
            (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        )

    def main_first(self) -> AbstractContextManager[None]:
        """A context in which the main process goes first, for example to download a file that the others then find."""
        return nullcontext() if self.world == 1 else self._accelerator.main_process_first()

    def part(self, count: int, multiple: int = 1) -> range:
        """The rows of `count` that this process works on. Parts follow each other in the order of the ranks.

        Args:
            count: number of all rows.
            multiple: parts begin at multiples of this number, so that batches of it are those of one process.
        """
        batches = -(-count // multiple)
        first, last = (batches * rank // self.world * multiple for rank in (self.rank, self.rank + 1))
        return range(min(first, count), min(last, count))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of the ranks."""
        return [value] if self.world == 1 else gather_object([value])

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all processes in the order of the ranks.

        Args:
            rows: the rows of this process (n, ...) on the CPU. A process without rows can give any shape (0, ...).

        Returns:
            (sum of n, ...) on the CPU.
        """
        if self.world == 1:
            return rows
        shapes = self.gather(tuple(rows.shape))
        inner = next((shape[1:] for shape in shapes if shape[0]), shapes[0][1:])
        whole = rows.new_empty(sum(shape[0] for shape in shapes), *inner)
        row_bytes = max(1, whole[:1].numel() * whole.element_size())
        for rank, own in enumerate(whole.split([shape[0] for shape in shapes])):
            if rank == self.rank and len(rows):
                own.copy_(rows)
            for piece in own.split(max(1, SENT_BYTES // row_bytes)) if len(own) else ():
                sent = broadcast(piece.to(self._accelerator.device, copy=True), from_process=rank)
                if rank != self.rank:
                    piece.copy_(sent)
        return whole


ALONE = Team()


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
