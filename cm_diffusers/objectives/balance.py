"""A loss of several parts, weighed so that none drowns the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """A place between a trained network and a frozen one after it, through which losses send their gradients.

    The frozen network is then passed once on the way back, for the ratios of gradients and for the step alike.

    Args:
        value: the trained network's result, with its graph.
        leaf: the same numbers, for the frozen network to go on from.
    """

    value: Tensor
    leaf: Tensor

    @classmethod
    def at(cls, value: Tensor) -> "Cut":
        return cls(value, value.detach().requires_grad_())


@dataclass(frozen=True)
class Part:
    """One loss of each sample (B,), its weight, and the limits of the factor that balancing adds to that.

    `cut` is where its gradient enters the trained network, if not by its own graph.
    """

    name: str
    per_sample: Tensor
    weight: float = 1.0
    limits: tuple[float, float] = (0.0, float("inf"))
    cut: Cut | None = None

    def before_cut(self) -> Tensor:
        """A number whose gradient by the trained weights is that of the mean loss."""
        if self.cut is None:
            return self.per_sample.mean()
        (slope,) = torch.autograd.grad(self.per_sample.sum(), self.cut.leaf, retain_graph=True)
        return (self.cut.value * slope).sum() / len(slope)


def last_layer(network: nn.Module) -> Tensor:
    """The weight of a U-Net's last layer, where the gradients of several losses are compared."""
    inner: Any = getattr(network, "network", network)
    return inner.conv_out.weight


def balanced(
    main: Part, others: Sequence[Part], layer: Tensor | None, average: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the means of `main` and `others`, and each part and weight, detached, by name.

    With a `layer`, a part's weight is multiplied by |d main / d layer| / (|d part / d layer| + 1e-4), within its
    limits, so that all pull alike: VQGAN's rule (Esser et al. 2021, arXiv:2012.09841, eq. 7), which CTM takes over.

    Args:
        main: what the others are measured by.
        others: the other parts.
        layer: a weight that all of them depend on; None leaves their weights alone.
        average: the mean of a tensor over all processes, whose batches together make the gradient.
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
