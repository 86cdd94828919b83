"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) of any function of a condition.

The denoised image, the jump and the velocity are linear in a network's output at a given point. Guiding any of them
therefore gives the same result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.core.arrays import append_dims
from cm_diffusers.core.conditions import Condition, call_network


def guide(
    call: Callable[[Condition], Tensor], condition: Condition, negative: Condition, scale: float | Tensor
) -> Tensor:
    """f_negative + w (f - f_negative), (B, ...), with one call for both (eq. 6).

    Args:
        call: returns f (2B, ...) for a condition of 2B rows.
        condition: B rows.
        negative: B rows to move away from; the null condition gives the paper's formula.
        scale: w, one for all rows or one per row (B,); 1 gives f itself.
    """
    both = call(condition.joined(negative))
    given, led_from = both[: both.shape[0] // 2], both[both.shape[0] // 2 :]  # ONNX's optimizer fails at chunk(2)
    if isinstance(scale, Tensor):
        scale = append_dims(scale, given)
    return led_from + scale * (given - led_from)


@dataclass(frozen=True)
class Guidance:
    """A condition, a negative condition to move away from, and the noise levels with guidance.

    Args:
        condition: B rows.
        negative: B rows.
        scale: w of `guide`.
        low, high: the lowest and highest sigma with guidance, both included (Kynkäänniemi et al. 2024,
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
    """The first output of `network(x, *times, **kwargs)`, guided if `told` has guidance at `sigma`.

    Args:
        network: called with `return_dict=False` and the condition.
        x: the network's input (B, ...).
        times: the time inputs, () for all samples or (B,).
        told: a condition, or a condition with guidance.
        sigma: the noise level, a scalar.
        kwargs: further keyword arguments; tensors among them have shape () or (B, ...).
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
