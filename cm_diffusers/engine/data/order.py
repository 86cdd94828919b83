"""The order of images: which ones each process takes in each training step, as a function of the seed alone."""

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
    """The part of each global batch that belongs to one process.

    Args:
        batch_size: images per forward pass of a process.
        accumulation: forward passes per training step (gradient accumulation).
        rank: number of this process, from 0.
        world: number of processes.
    """

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def global_batch(self) -> int:
        """Images per training step on all processes together."""
        return self.batch_size * self.accumulation * self.world

    def rows(self, micro: int) -> range:
        """Return the rows of the global batch that this process takes in forward pass `micro` of a step, from 0."""
        start = (micro * self.world + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


@dataclass(frozen=True)
class Mixture:
    """How often images are drawn from each of several concatenated datasets.

    Args:
        sizes: number of images of each dataset.
        weights: weight of each dataset; only the ratios matter.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    block = 1000  # images, among which each dataset has the same number in every block

    def turn(self, position: int, order: Callable[[int, str, int], Tensor]) -> tuple[int, int]:
        """Return the dataset at a position of the sequence, and the number of its earlier turns.

        Args:
            position: position in the sequence of all images, from 0.
            order: order(n, name, number) gives a keyed permutation of range(n), int64 (n,).
        """
        block, place = divmod(position, self.block)
        turns = self._sources[order(self.block, "turns", block)]
        source = int(turns[place])
        return source, block * self.counts[source] + int((turns[:place] == source).sum())

    @cached_property
    def _sources(self) -> Tensor:
        """The dataset of each place of a block before shuffling, int64 (1000,)."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))

    @cached_property
    def counts(self) -> list[int]:
        """Images of each dataset in a block: at least one each, 1,000 in total."""
        shares = [self.block * weight / sum(self.weights) for weight in self.weights]
        counts = [max(1, int(share)) for share in shares]
        while (missing := self.block - sum(counts)) != 0:
            gaps = [share - count if missing > 0 or count > 1 else math.inf for share, count in zip(shares, counts)]
            counts[gaps.index(max(gaps) if missing > 0 else min(gaps))] += 1 if missing > 0 else -1
        return counts


class KeyedOrder(Sampler):
    """Lists of dataset indices, one per forward pass, from `step` on: a function of (seed, epoch) alone.

    Args:
        n: number of images.
        share: the part of each global batch that belongs to this process.
        seed: seed of the run.
        step: the first training step.
        mixture: weights of concatenated datasets, each with separate epochs; None draws by their sizes.
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
        """A keyed permutation. The last two of each name are cached."""
        if (name, epoch) not in self._orders:
            self._orders = {key: o for key, o in self._orders.items() if key[0] != name or key[1] >= epoch - 1}
            self._orders[name, epoch] = permutation(n, self.seed, name, epoch)
        return self._orders[name, epoch]


class BucketOrder(Sampler):
    """Lists of dataset indices, one per forward pass. All images of a training step are from one bucket.

    In each block of 1,000 steps, a bucket has steps in proportion to its size, at least one, in a keyed order. Each
    bucket has separate epochs. Like `KeyedOrder`, it is a function of the seed and the step.

    Args:
        buckets: the dataset indices of each bucket.
        share: the part of each global batch that belongs to this process.
        seed: seed of the run.
        step: the first training step.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], share: ProcessShare, seed: int, step: int = 0):
        self.buckets, self.share, self.seed, self.step = buckets, share, seed, step
        sizes = tuple(map(len, buckets))
        self.mixture = Mixture(sizes, sizes)  # its blocks count steps, not images
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
