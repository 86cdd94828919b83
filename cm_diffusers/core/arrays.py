"""What formulas need so that they take tensors, and the arrays of NumPy with which schedulers choose levels."""

from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


Values = TypeVar("Values", Tensor, np.ndarray)


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
    cosine = F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)
    if cosine < -1 + 1e-6:
        raise ValueError("The two noises point in opposite directions; no arc between them is the shortest.")
    angle = cosine.clamp(max=1).arccos().clamp(min=1e-6)  # so small, it gives the straight line
    weights = weights.to(angle).reshape(-1, *[1] * a.ndim)
    return (((1 - weights) * angle).sin() / angle.sin() * a + (weights * angle).sin() / angle.sin() * b).to(a.dtype)
