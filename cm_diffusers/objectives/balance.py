"""A loss of several parts, weighed so that none drowns the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """One loss of each sample (B,), its weight, and the limits of the factor that adaptive balancing adds to that."""

    name: str
    per_sample: Tensor
    weight: float = 1.0
    limits: tuple[float, float] = (0.0, float("inf"))


def last_layer(network: nn.Module) -> Tensor:
    """The weight of a U-Net's last layer, where the gradients of several losses are compared."""
    return getattr(network, "network", network).conv_out.weight


def balanced(
    main: Part, others: Sequence[Part], layer: Tensor | None, average: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the means of `main` and `others`, and each part and weight, detached, by name.

    With a `layer`, a part's weight is multiplied by |d main / d layer| / (|d part / d layer| + 1e-4), within its
    limits, so that all pull alike (Esser et al. 2021, arXiv:2012.09841, eq. 7; in CTM, arXiv:2310.02279, eq. 15).

    Args:
        main: what the others are measured by.
        others: the other parts.
        layer: a weight that all of them depend on; None leaves their weights alone.
        average: the mean of a tensor over all processes, whose batches together make the gradient.
    """

    def gradient_norm(part: Part) -> Tensor:
        return average(torch.autograd.grad(part.per_sample.mean(), layer, retain_graph=True)[0]).norm()

    total, terms = main.per_sample.mean(), {main.name: main.per_sample.detach()}
    norm = gradient_norm(main) if layer is not None and others else None
    for part in others:
        weight = torch.tensor(part.weight, device=total.device)
        if norm is not None:
            weight = weight * (norm / (gradient_norm(part) + 1e-4)).clamp(*part.limits)
        total = total + weight * part.per_sample.mean()
        terms |= {part.name: part.per_sample.detach(), f"{part.name}_weight": weight}
    return total, terms
