"""The loss by noise level, because the total of a consistency loss stays flat while its parts change."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


EDGES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
NAMES = [f"{low:g}-{high:g}" for low, high in zip((0, *EDGES), (*EDGES, float("inf")))]


class LossMeter:
    """Running means of per-sample losses by noise level, and of other terms.

    `values` holds sums and counts, float64 (bins + terms, 2) on the CPU. The bins of sigma have the bounds `EDGES`.

    Args:
        terms: names of other quantities to average.
        values: sums and counts to continue from, in the shape of the attribute `values`.
    """

    def __init__(self, terms: Sequence[str] = (), values: list | None = None):
        self.terms = terms
        self.values = (
            torch.zeros(len(NAMES) + len(terms), 2, dtype=torch.float64)
            if values is None
            else torch.tensor(values, dtype=torch.float64)
        )

    def add(self, per_sample: Tensor, sigma: Tensor, terms: Mapping[str, Tensor] = {}) -> None:
        """Add the losses and terms of one batch.

        Args:
            per_sample: losses (B,).
            sigma: noise levels (B,).
            terms: values of any shape by the names of their terms; terms can be missing.
        """
        bins = torch.bucketize(sigma.detach().cpu(), torch.tensor(EDGES))
        self.values[:, 0].index_add_(0, bins, per_sample.cpu().double())
        self.values[:, 1].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
        for name, values in terms.items():
            row = self.values[len(NAMES) + self.terms.index(name)]
            row[0] += values.cpu().double().sum()
            row[1] += values.numel()

    def read(self) -> dict:
        """Means: "loss" (None without samples), "loss_by_sigma", and each term. Empty bins and terms are omitted."""
        total, count = self.values[: len(NAMES)].sum(0).tolist()
        means = {name: s / n for name, (s, n) in zip((*NAMES, *self.terms), self.values.tolist()) if n}
        terms = {name: means.pop(name) for name in self.terms if name in means}
        return {"loss": total / count if count else None, "loss_by_sigma": means, **terms}
