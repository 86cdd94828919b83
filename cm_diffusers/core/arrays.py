"""Helpers by which formulas accept torch tensors and NumPy arrays, in which schedulers choose noise levels."""

from functools import lru_cache
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


Values = TypeVar("Values", Tensor, np.ndarray)


NO_FLOAT64 = ("mps",)  # device types without float64: Apple's GPUs


def lacks_float64(device: str | torch.device | None) -> bool:
    """Whether `device` lacks float64; False for None."""
    return device is not None and torch.device(device).type in NO_FLOAT64


def in_float64(values: Tensor) -> Tensor:
    """`values` (any shape) in float64: on their device, or on the CPU if the device lacks float64."""
    return (values.cpu() if lacks_float64(values.device) else values).double()


def sent(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` (any shape) on `device`. A GPU gets them from pinned memory, so that the process does not wait."""
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@lru_cache(maxsize=32)
def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A constant float64 `table` (any shape) on `device`, or on the CPU if the device lacks float64.

    The copy of each table object is kept, because a copy to a GPU waits for all work in its queue.
    """
    return table if lacks_float64(device) else table.to(device)


def append_dims(values: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample `values` (B,) so that they broadcast against `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def math_of(values: Tensor | np.ndarray | float) -> ModuleType:
    """The module with log, exp, tan, ... for `values` of any shape: torch for tensors, else NumPy.

    The two can differ in the last bit, so formulas never convert between them.
    """
    return torch if torch.is_tensor(values) else np


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation from `a` (...) to `b` (...) at each of `weights` (N,) in [0, 1]: (N, ...).

    Raises:
        ValueError: `a` and `b` point in opposite directions, so no arc between them is the shortest.
    """
    start, end = in_float64(a), in_float64(b)
    cosine = F.cosine_similarity(start.flatten(), end.flatten(), dim=0)
    if cosine < -1 + 1e-6:
        raise ValueError(
            "The two noises point in opposite directions, so no arc between them is the shortest; change one of them."
        )
    angle = cosine.clamp(max=1).arccos().clamp(min=1e-6)  # an angle this small gives the straight line
    weights = weights.to(angle).reshape(-1, *[1] * a.ndim)
    return (((1 - weights) * angle).sin() / angle.sin() * start + (weights * angle).sin() / angle.sin() * end).to(a)
