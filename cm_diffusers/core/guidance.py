"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), of whatever is told a condition.

All that is linear in a network's output at a given point (the denoised image, the jump, the velocity) is guided alike,
so that it does not matter to which of them the formula is applied.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.core.conditions import Condition, call_network


def guide(call: Callable[[Condition], Tensor], condition: Condition, negative: Condition, scale: float) -> Tensor:
    """f_negative + w (f - f_negative), of scale w, by one call for both (eq. 6).

    Args:
        call: gives f (2B, ...) for a condition of 2B rows.
        condition: B rows.
        negative: as many, to be led away from, which for the null condition gives the paper's formula.
        scale: w; 1 is f itself.
    """
    both = call(condition.joined(negative))
    given, led_from = both[: both.shape[0] // 2], both[both.shape[0] // 2 :]  # ONNX's optimizer fails at chunk(2)
    return led_from + scale * (given - led_from)


@dataclass(frozen=True)
class Guidance:
    """What a network is told of each sample, and what it is led away from, within an interval of noise levels.

    Args:
        condition: B rows.
        negative: as many.
        scale: w.
        low, high: the levels sigma, both included, at which there is guidance (Kynkäänniemi et al. 2024,
            arXiv:2404.07724).
    """

    condition: Condition
    negative: Condition
    scale: float
    low: float = 0.0
    high: float = math.inf


def call_guided(
    network: Callable, x: Tensor, *times: Tensor, told: Condition | Guidance, sigma: Tensor | float, **kwargs: Any
) -> Tensor:
    """The first output of `network(x, *times, **kwargs)`, guided if `told` says so for the scalar level `sigma`.

    Tensors among the times and keywords are for all samples, (), or for each, (B,).
    """
    if isinstance(told, Guidance) and not told.low <= sigma <= told.high:
        told = told.condition
    if not isinstance(told, Guidance):
        return call_network(network, x, *times, condition=told, return_dict=False, **kwargs)[0]

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if torch.is_tensor(value) and value.ndim else value

    x, times = twice(x), tuple(map(twice, times))
    kwargs = {name: twice(value) for name, value in kwargs.items()}

    def both(condition: Condition) -> Tensor:
        return call_network(network, x, *times, condition=condition, return_dict=False, **kwargs)[0]

    return guide(both, told.condition, told.negative, told.scale)
