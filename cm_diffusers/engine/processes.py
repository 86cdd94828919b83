"""Accelerate's view of the processes, checked against the launcher's, and how they end."""

import os
import sys
import time
from typing import Any, NoReturn

import torch
from accelerate import Accelerator


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
            f" torchrun --nproc_per_node {launched} training/..."
        )
    return accelerator


def end_with(error: Exception) -> NoReturn:
    """End the program for an error of the user, by its message and code 2; several processes print it once.

    Others than the main process wait first, as the launcher ends them where the main one has failed as well.
    """
    number = int(os.environ.get("RANK", 0))
    if number > 0:
        time.sleep(PATIENCE)
    print(f"error: {error}" + (f" (process {number})" if number > 0 else ""), file=sys.stderr, flush=True)
    raise SystemExit(2) from None
