"""Accelerate's view of the processes, checked against the launcher's."""

import os
from typing import Any

from accelerate import Accelerator


def start_accelerator(**settings: Any) -> Accelerator:
    """An `Accelerator(**settings)` of all the processes that were launched.

    Raises:
        ValueError: they would not know of each other, as without a GPU by `--multi_gpu` alone, and each would do all.
    """
    accelerator = Accelerator(**settings)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, and Accelerate knows of {accelerator.num_processes}. Without GPUs"
            " start with ACCELERATE_USE_CPU=true accelerate launch ..."
        )
    return accelerator
