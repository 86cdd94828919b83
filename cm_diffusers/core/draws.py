"""Keyed randomness: every random number of a training step is a function of (seed, step, row), so none is stored.

Rows are positions in the global batch. Each row has its own stream, so a process draws only its own rows, and any
number of processes draws the same batch. Resuming needs only the step number (the idea is EDM2's, Karras et al. 2023,
arXiv:2312.02696). Numbers are drawn on the CPU, so they do not depend on the device.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 64-bit seed that depends on all `parts` and on nothing else, such as PYTHONHASHSEED or the platform."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def permutation(n: int, *key: object) -> Tensor:
    """A random order of range(`n`), int64 (n,), which depends only on `key`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed("permutation", *key)))


class Draws:
    """The random numbers of one training step.

    Args:
        seed: the run's seed.
        step: the training step, which also sets the curricula.
        rows: the positions of this batch's B samples in the global batch.
        device: the device of the drawn numbers.
    """

    def __init__(self, seed: int, step: int, rows: Sequence[int], device: torch.device | str = "cpu"):
        self.seed, self.step, self.rows, self.device = seed, step, rows, torch.device(device)
        self._generator = torch.Generator()

    def _draw(self, sampler: Callable, name: str, shape: Sequence[int]) -> Tensor:
        out = torch.empty(len(self.rows), *shape)
        for row, values in zip(self.rows, out):
            sampler(values, generator=self._generator.manual_seed(derive_seed(self.seed, name, self.step, row)))
        return out.to(self.device)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Unit normal numbers (B, *shape), with `shape` for each row.

        Each `name` is an independent stream; the same name gives the same numbers.
        """
        return self._draw(Tensor.normal_, name, shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape); `name` and `shape` are as in `normal`."""
        return self._draw(Tensor.uniform_, name, shape)

    def shared(self, name: str) -> Tensor:
        """One uniform number in [0, 1) from the stream `name`, the same for all rows of the step: () on the CPU."""
        return torch.rand((), generator=self._generator.manual_seed(derive_seed(self.seed, name, self.step)))

    def keys(self, name: str) -> Tensor:
        """An integer per row from the stream `name`, int64 (B,), for networks that draw their own random numbers."""
        seeds = [derive_seed(self.seed, name, self.step, row) >> 1 for row in self.rows]
        return torch.tensor(seeds, device=self.device)

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """Inside this block networks draw the same dropout masks each time it is entered.

        The masks of stock networks depend on the local batch size, so one process equals two only in distribution.
        Networks with keyed dropout take `keys`, and the equality is exact.
        """
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            torch.manual_seed(derive_seed(self.seed, "dropout", self.step, self.rows[0]))
            yield
