"""Steps that are skipped because a loss or gradient is not finite: counted on the device, without a wait for it."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor


class Skipped(NamedTuple):
    """The skipped steps of a run.

    Args:
        count: all of them.
        in_a_row: those of the present row, without those that only show that the scale of fp16 was too high.
        longest: the longest row since the last look.
        last: the number of the last one, from 1; 0 for none.
    """

    count: int = 0
    in_a_row: int = 0
    longest: int = 0
    last: int = 0


class SkippedSteps:
    """Counts skipped steps on a device. Only `look` waits for it.

    Args:
        accelerator: the processes of the run, and the device.
        count, in_a_row: the counts to continue from.
    """

    def __init__(self, accelerator: Accelerator, count: int = 0, in_a_row: int = 0):
        self.accelerator = accelerator
        start = Skipped(count, in_a_row, in_a_row, 0)
        self._counts = torch.tensor(start, device=accelerator.device)

    def add(self, skipped: Tensor, is_fault: Tensor, step: int) -> None:
        """Count a step.

        Args:
            skipped: () bool, whether the step is skipped, the same on all processes.
            is_fault: () bool, whether that is a fault of the run and not of the scale of fp16.
            step: its number, from 1.
        """
        count, in_a_row, longest, last = self._counts.unbind()
        in_a_row = torch.where(skipped, in_a_row + is_fault, 0)
        last = torch.where(skipped, step, last)
        self._counts = torch.stack([count + skipped, in_a_row, torch.maximum(longest, in_a_row), last])

    def look(self) -> Skipped:
        """The counts, of the process with the most faults. All processes call it; the longest row begins anew."""
        counts = self._counts
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts[None]).amax(0)
        found = Skipped(*counts.tolist())
        self._counts = torch.stack([*self._counts[:2], self._counts[1], self._counts[3]])
        return found
