"""A loss of several parts, weighted so that none dominates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """A place between a trained network and a frozen network after it, through which losses send their gradients.

    One backward pass through the frozen network then serves both the ratios of gradients and the training step.

    Args:
        value: the trained network's result (B, ...), with its graph.
        leaf: the same numbers, as the input of the frozen network.
    """

    value: Tensor
    leaf: Tensor

    @classmethod
    def at(cls, value: Tensor) -> "Cut":
        """The cut at `value` (B, ...)."""
        return cls(value, value.detach().requires_grad_())


@dataclass(frozen=True)
class Part:
    """One part of a loss.

    Args:
        name: its name in the log.
        per_sample: the loss (B,) of each sample.
        weight: its weight before balancing.
        limits: the smallest and largest factor by which balancing multiplies the weight.
        cut: where its gradient enters the trained network; None if its own graph leads there.
    """

    name: str
    per_sample: Tensor
    weight: float = 1.0
    limits: tuple[float, float] = (0.0, float("inf"))
    cut: Cut | None = None

    def before_cut(self) -> Tensor:
        """A scalar whose gradient with respect to the trained weights is that of the mean loss."""
        if self.cut is None:
            return self.per_sample.mean()
        (slope,) = torch.autograd.grad(self.per_sample.sum(), self.cut.leaf, retain_graph=True)
        return (self.cut.value * slope).sum() / len(slope)


def last_layer(network: nn.Module) -> Tensor:
    """The weight of the last layer of `network`, a U-Net, where the gradients of several losses are compared."""
    inner: Any = getattr(network, "network", network)
    return inner.conv_out.weight


def balanced(
    main: Part, others: Sequence[Part], layer: Tensor | None, average: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the means of `main` and `others`, and each part and weight, detached, by name.

    A `layer` multiplies each part's weight by |d main / d layer| / (|d part / d layer| + 1e-4), within its limits. The
    gradients of all parts then have similar sizes. This is VQGAN's rule (Esser et al. 2021, arXiv:2012.09841, eq. 7),
    which CTM adopts.

    Args:
        main: the part whose gradient sets the scale; its loss has shape (B,).
        others: the other parts.
        layer: a weight that all parts depend on; None keeps the given weights.
        average: returns the mean of a tensor over all processes, whose batches together make the gradient.
    """

    def gradient_norm(loss: Tensor, layer: Tensor) -> Tensor:
        return average(torch.autograd.grad(loss, layer, retain_graph=True)[0]).norm()

    total = main.before_cut()
    value, terms = main.per_sample.mean().detach(), {main.name: main.per_sample.detach()}
    norm = gradient_norm(total, layer) if layer is not None and others else None
    for part in others:
        loss, weight = part.before_cut(), total.new_full((), part.weight)
        if norm is not None and layer is not None:
            weight = weight * (norm / (gradient_norm(loss, layer) + 1e-4)).clamp(*part.limits)
        total = total + weight * loss
        value = value + weight * part.per_sample.mean().detach()
        terms |= {part.name: part.per_sample.detach(), f"{part.name}_weight": weight}
    return total + (value - total).detach(), terms
