"""The loss by noise level: consistency losses are flat as a whole, so that only their parts tell something."""

import torch
from torch import Tensor


EDGES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
NAMES = [f"{low:g}-{high:g}" for low, high in zip((0, *EDGES), (*EDGES, float("inf")))]


class LossMeter:
    """Sums and counts of per-sample losses by noise level, float64 (bins, 2) on the CPU."""

    def __init__(self, values: list | None = None):
        self.values = (
            torch.zeros(len(NAMES), 2, dtype=torch.float64)
            if values is None
            else torch.tensor(values, dtype=torch.float64)
        )

    def add(self, per_sample: Tensor, sigma: Tensor) -> None:
        """Count in losses (B,) at noise levels (B,)."""
        bins = torch.bucketize(sigma.detach().cpu(), torch.tensor(EDGES))
        self.values[:, 0].index_add_(0, bins, per_sample.cpu().double())
        self.values[:, 1].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))

    def read(self) -> dict:
        """The mean loss, over all and by noise level (levels that were not drawn are left out)."""
        total, count = self.values.sum(0).tolist()
        bins = {name: (s / n) for name, (s, n) in zip(NAMES, self.values.tolist()) if n}
        return {"loss": total / count if count else None, "loss_by_sigma": bins}
