"""Keyed randomness: every random number of a training step is a function of (seed, step, row), so none is stored.

Rows are positions in the global batch. Each row has its own stream, so a process draws only its own rows, and any
number of processes draws the same batch. Resuming needs only the step number (the idea is EDM2's, Karras et al. 2023,
arXiv:2312.02696).

Numbers are hashed on the device of the run, without a copy from the host: one SHA-256 per name gives the seed of the
rows' seeds, and a row's seed that of its numbers. Integers and uniform numbers are the same on every device; of 2^28
normal numbers about one differs in its last bit, because devices round log, cos and sin in float64 differently.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from cm_diffusers.core.arrays import lacks_float64
from cm_diffusers.core.counter_hash import GAMMA, mix, stream


BLOCK = 2**16  # numbers that the CPU hashes at once, so that they stay in its cache


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

    rule = 2  # the number of the rule from (seed, step, row) to numbers, which checkpoints record

    def __init__(self, seed: int, step: int, rows: Sequence[int], device: torch.device | str = "cpu"):
        self.seed, self.step, self.rows, self.device = seed, step, rows, torch.device(device)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Unit normal numbers, float32 (B, *shape), with `shape` for each row.

        Each `name` is an independent stream; the same name gives the same numbers, of which a smaller shape takes the
        first ones.
        """
        count = math.prod(shape)
        pairs = torch.empty(len(self.rows), (count + 1) // 2, 2, dtype=torch.float32, device=self._hashed_on)
        for numbers, pair in self._blocks(name, pairs):
            _box_muller(numbers, pair)
        return pairs.flatten(1)[:, :count].reshape(-1, *shape).to(self.device)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1), float32 (B, *shape), multiples of 2^-24; `name` and `shape` as in `normal`."""
        out = torch.empty(len(self.rows), math.prod(shape), dtype=torch.float32, device=self._hashed_on)
        for numbers, part in self._blocks(name, out):
            part.copy_((numbers >> 40).bitwise_and_(2**24 - 1)).mul_(2**-24)
        return out.reshape(-1, *shape).to(self.device)

    def shared(self, name: str) -> Tensor:
        """One uniform number in [0, 1) from the stream `name`, the same for all rows of the step: () on the CPU."""
        return torch.tensor((derive_seed(self.seed, name, self.step) >> 40) * 2.0**-24, dtype=torch.float32)

    def keys(self, name: str) -> Tensor:
        """An integer per row from the stream `name`, int64 (B,), for networks that draw their own random numbers."""
        return self._seeds(name).to(self.device)

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """Inside this block networks draw the same dropout masks each time it is entered.

        The masks of stock networks depend on the local batch size, so one process equals two only in distribution.
        Networks with keyed dropout take `keys`, and the equality is exact.
        """
        devices = [] if self.device.type == "cpu" else [self.device]
        # `torch.manual_seed` also notes a stack trace for each kind of device that the machine lacks, which is slow
        seed = torch.manual_seed if devices else torch.default_generator.manual_seed
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            seed(derive_seed(self.seed, "dropout", self.step, self.rows[0]))
            yield

    @cached_property
    def _hashed_on(self) -> torch.device:
        return torch.device("cpu") if lacks_float64(self.device) else self.device

    def _seeds(self, name: str) -> Tensor:
        """The seeds of the rows' streams, int64 (B,): numbers of the stream of (seed, name, step), at the rows."""
        if isinstance(self.rows, range):
            rows = torch.arange(self.rows.start, self.rows.stop, self.rows.step, device=self._hashed_on)
        else:
            rows = torch.tensor(self.rows, dtype=torch.int64, device=self._hashed_on)
        return mix((rows + 1) * GAMMA + (derive_seed(self.seed, name, self.step) - 2**63))

    def _blocks(self, name: str, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers of the rows' streams (b, n), for successive blocks of rows, with the rows of `out` (B, n, ...)."""
        count = out.shape[1]
        rows = max(1, BLOCK // max(count, 1) if self._hashed_on.type == "cpu" else len(out))
        for seeds, part in zip(torch.split(self._seeds(name), rows), torch.split(out, rows)):
            yield stream(seeds, count), part


def _box_muller(numbers: Tensor, pairs: Tensor) -> None:
    """Fill `pairs` (b, n, 2), float32, with unit normal numbers from uniform `numbers` (b, n), int64.

    In float64 (Box & Muller 1958), the low 32 bits of a number give the radius. All bits give the angle, as a signed
    fraction of pi; of the radius's bits it keeps less than a normal number's rounding.
    """
    angle = numbers.double().mul_(math.pi / 2**63)
    radius = numbers.bitwise_and_(2**32 - 1).double().add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    ends = angle.cos().mul_(radius).float(), angle.sin_().mul_(radius).float()
    torch.complex(*ends, out=torch.view_as_complex(pairs))


class SequentialDraws(Draws):
    """The draws of runs that began before checkpoints recorded a rule: a torch generator on the CPU for each row."""

    rule = 1

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator()

    def _draw(self, sampler: Callable, name: str, shape: Sequence[int]) -> Tensor:
        out = torch.empty(len(self.rows), *shape)
        for row, values in zip(self.rows, out):
            sampler(values, generator=self._generator.manual_seed(derive_seed(self.seed, name, self.step, row)))
        return out.to(self.device)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return self._draw(Tensor.normal_, name, shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return self._draw(Tensor.uniform_, name, shape)

    def shared(self, name: str) -> Tensor:
        return torch.rand((), generator=self._generator.manual_seed(derive_seed(self.seed, name, self.step)))

    def keys(self, name: str) -> Tensor:
        seeds = [derive_seed(self.seed, name, self.step, row) >> 1 for row in self.rows]
        return torch.tensor(seeds, device=self.device)


def draws_by(rule: int) -> type[Draws]:
    """The class of draws for the `rule` that a checkpoint records.

    Raises:
        ValueError: this version does not know the rule.
    """
    classes = {cls.rule: cls for cls in (SequentialDraws, Draws)}
    if rule not in classes:
        raise ValueError(
            f"The random numbers of this run follow rule {rule}, but this version of cm_diffusers knows only"
            f" {' and '.join(map(str, classes))}. Continue the run with the version that began it, or a newer one."
        )
    return classes[rule]
