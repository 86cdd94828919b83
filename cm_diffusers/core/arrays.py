"""What formulas need so that they take tensors, and the arrays of NumPy with which schedulers choose levels."""

from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


Values = TypeVar("Values", Tensor, np.ndarray)


NO_FLOAT64 = ("mps",)  # types of devices that know no float64: Apple's GPUs


def lacks_float64(device: str | torch.device | None) -> bool:
    """Whether a device knows no float64."""
    return device is not None and torch.device(device).type in NO_FLOAT64


def in_float64(values: Tensor) -> Tensor:
    """`values` in float64: on their device, or on the CPU where the device knows none."""
    return (values.cpu() if lacks_float64(values.device) else values).double()


def append_dims(values: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample `values` (B,) so that they broadcast against `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def math_of(values: Tensor | np.ndarray | float) -> ModuleType:
    """The module with log, exp, tan, ... for `values`: torch for tensors, else NumPy.

    Their results may differ in the last bit, so nothing is converted from one to the other on the way.
    """
    return torch if torch.is_tensor(values) else np


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """From `a` (...) to `b` (...) along the sphere, at each of `weights` (N,) in [0, 1]: (N, ...).

    Raises:
        ValueError: `b` points against `a`, so that no arc is the shortest.
    """
    start, end = in_float64(a), in_float64(b)
    cosine = F.cosine_similarity(start.flatten(), end.flatten(), dim=0)
    if cosine < -1 + 1e-6:
        raise ValueError("The two noises point in opposite directions; no arc between them is the shortest.")
    angle = cosine.clamp(max=1).arccos().clamp(min=1e-6)  # so small, it gives the straight line
    weights = weights.to(angle).reshape(-1, *[1] * a.ndim)
    return (((1 - weights) * angle).sin() / angle.sin() * start + (weights * angle).sin() / angle.sin() * end).to(a)
