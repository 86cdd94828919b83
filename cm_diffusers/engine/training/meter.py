"""The loss by noise level, because the total of a consistency loss stays flat while its parts change."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cm_diffusers.core.arrays import lacks_float64


EDGES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
NAMES = [f"{low:g}-{high:g}" for low, high in zip((0, *EDGES), (*EDGES, float("inf")))]


class LossMeter:
    """Running means of per-sample losses by noise level, and of other terms. `add` does not wait for the device.

    `values` holds sums and counts, float64 (bins + terms, 2); on devices without float64, float32. The bins of sigma
    have the bounds `EDGES`.

    Args:
        terms: names of other quantities to average.
        values: sums and counts to continue from, in the shape of the attribute `values`.
        device: where sums are kept.
    """

    def __init__(self, terms: Sequence[str] = (), values: list | None = None, device: torch.device | str = "cpu"):
        self.terms, dtype = terms, torch.float32 if lacks_float64(torch.device(device)) else torch.float64
        shape = (len(NAMES) + len(terms), 2)
        self.values = torch.tensor(values or torch.zeros(shape).tolist(), dtype=dtype, device=device)
        self._edges = torch.tensor(EDGES, device=device)

    def add(
        self, per_sample: Tensor, sigma: Tensor, terms: Mapping[str, Tensor] = {}, left_out: Tensor | bool = False
    ):
        """Add the losses and terms of one batch.

        Args:
            per_sample: losses (B,).
            sigma: noise levels (B,).
            terms: values of any shape by the names of their terms; terms can be missing.
            left_out: () bool, whether the batch is left out.
        """
        kept = ~torch.as_tensor(left_out, device=self.values.device)
        bins = torch.bucketize(sigma.detach(), self._edges)
        member = (bins == torch.arange(len(NAMES), device=bins.device)[:, None]) & kept  # (bins, B)
        rows = [self._sums(torch.where(member, per_sample.detach(), 0)), member.sum(1)]
        self.values[: len(NAMES)] += torch.stack([rows[0], rows[1].to(self.values)], 1)
        for name, values in terms.items():
            row = self.values[len(NAMES) + self.terms.index(name)]
            row[0] += self._sums(torch.where(kept, values.detach().flatten(), 0)[None])[0]
            row[1] += kept * values.numel()

    def _sums(self, values: Tensor) -> Tensor:
        return values.to(self.values.dtype).sum(1)

    def read(self) -> dict:
        """Means: "loss" (None without samples), "loss_by_sigma", and each term. Empty bins and terms are omitted."""
        total, count = self.values[: len(NAMES)].sum(0).tolist()
        means = {name: s / n for name, (s, n) in zip((*NAMES, *self.terms), self.values.tolist()) if n}
        terms = {name: means.pop(name) for name in self.terms if name in means}
        return {"loss": total / count if count else None, "loss_by_sigma": means, **terms}
