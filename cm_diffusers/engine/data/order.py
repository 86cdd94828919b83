"""Which images each process takes in each step: a function of the seed and nothing else."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cm_diffusers.core.draws import permutation


@dataclass(frozen=True)
class ProcessShare:
    """Where a process stands: what it takes of each global batch."""

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.world

    def rows(self, micro: int) -> range:
        """Rows of the global batch that this process takes in its forward pass number `micro`."""
        start = (micro * self.world + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


@dataclass(frozen=True)
class Mixture:
    """How often each of several datasets, which lie behind one another, has its turn.

    Args:
        sizes: of the datasets.
        weights: of the datasets; only their ratios count.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    block = 1000  # images, of which each dataset has the same number every time

    def turn(self, position: int, order: Callable[[int, str, int], Tensor]) -> tuple[int, int]:
        """Which dataset has its turn at a position, and how many turns it has had before.

        Args:
            position: from 0 on.
            order: gives the keyed permutation of range(n) by n, a name and a number.
        """
        block, place = divmod(position, self.block)
        turns = self._sources[order(self.block, "turns", block)]
        source = int(turns[place])
        return source, block * self.counts[source] + int((turns[:place] == source).sum())

    @cached_property
    def _sources(self) -> Tensor:
        """Which dataset each place of a block is of, before they are shuffled."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))

    @cached_property
    def counts(self) -> list[int]:
        """How many images of a block each dataset gives: at least one, and all together the block."""
        shares = [self.block * weight / sum(self.weights) for weight in self.weights]
        counts = [max(1, int(share)) for share in shares]
        while (missing := self.block - sum(counts)) != 0:
            gaps = [share - count if missing > 0 or count > 1 else math.inf for share, count in zip(shares, counts)]
            counts[gaps.index(max(gaps) if missing > 0 else min(gaps))] += 1 if missing > 0 else -1
        return counts


class KeyedOrder(Sampler):
    """Lists of dataset indices, one per forward pass, from `step` on: a function of (seed, epoch) and nothing else.

    Args:
        n: how many images there are.
        share: where this process stands.
        seed: of the run.
        step: the training step to begin with.
        mixture: how often datasets have their turn, if not by their sizes; each has epochs of its own.
    """

    def __init__(self, n: int, share: ProcessShare, seed: int, step: int = 0, mixture: Mixture | None = None):
        self.n, self.share, self.seed, self.step, self.mixture = n, share, seed, step, mixture
        self._orders: dict[tuple[object, ...], Tensor] = {}

    def __iter__(self) -> Iterator[list[int]]:
        step, place = self.step, self._place if self.mixture is None else self._mixed_place
        while True:
            for micro in range(self.share.accumulation):
                yield [place(step * self.share.global_batch + row) for row in self.share.rows(micro)]
            step += 1

    def _place(self, position: int) -> int:
        epoch, offset = divmod(position, self.n)
        return int(self._order(self.n, "epoch", epoch)[offset])

    def _mixed_place(self, position: int) -> int:
        source, turn = self.mixture.turn(position, self._order)
        epoch, offset = divmod(turn, self.mixture.sizes[source])
        return sum(self.mixture.sizes[:source]) + int(
            self._order(self.mixture.sizes[source], f"epoch of {source}", epoch)[offset]
        )

    def _order(self, n: int, name: str, epoch: int) -> Tensor:
        """A keyed permutation; the last two of each name are kept."""
        if (name, epoch) not in self._orders:
            self._orders = {key: o for key, o in self._orders.items() if key[0] != name or key[1] >= epoch - 1}
            self._orders[name, epoch] = permutation(n, self.seed, name, epoch)
        return self._orders[name, epoch]


class BucketOrder(Sampler):
    """Lists of dataset indices, one per forward pass: all those of a step are of one bucket.

    In each block of 1,000 steps a bucket has its share of the turns by its size, at least one, in a keyed order; it
    has epochs of its own. A function of the seed and the step, as `KeyedOrder` is.

    Args:
        buckets: the indices of each.
        share: where this process stands.
        seed: of the run.
        step: the training step to begin with.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], share: ProcessShare, seed: int, step: int = 0):
        self.buckets, self.share, self.seed, self.step = buckets, share, seed, step
        sizes = tuple(map(len, buckets))
        self.mixture = Mixture(sizes, sizes)  # of steps
        self._order = lru_cache(2 * len(buckets) + 2)(lambda n, name, epoch: permutation(n, seed, name, epoch))

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while True:
            bucket, turn = self.mixture.turn(step, self._order)
            for micro in range(self.share.accumulation):
                positions = (turn * self.share.global_batch + row for row in self.share.rows(micro))
                yield [self._image(bucket, position) for position in positions]
            step += 1

    def _image(self, bucket: int, position: int) -> int:
        images = self.buckets[bucket]
        epoch, offset = divmod(position, len(images))
        return images[int(self._order(len(images), f"bucket {bucket}", epoch)[offset])]
