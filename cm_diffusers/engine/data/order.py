"""Which images each process takes in each step: a function of the seed and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass

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


class KeyedOrder(Sampler):
    """Lists of dataset indices, one per forward pass, from `step` on: a function of (seed, epoch) and nothing else."""

    def __init__(self, n: int, share: ProcessShare, seed: int, step: int = 0):
        self.n, self.share, self.seed, self.step = n, share, seed, step

    def __iter__(self) -> Iterator[list[int]]:
        step, orders = self.step, {}
        while True:
            for micro in range(self.share.accumulation):
                indices = []
                for row in self.share.rows(micro):
                    epoch, offset = divmod(step * self.share.global_batch + row, self.n)
                    if epoch not in orders:
                        orders = {e: o for e, o in orders.items() if e >= epoch - 1}
                        orders[epoch] = permutation(self.n, self.seed, "epoch", epoch)
                    indices.append(int(orders[epoch][offset]))
                yield indices
            step += 1
