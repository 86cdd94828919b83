"""What formulas need so that they take tensors, and the arrays of NumPy with which schedulers choose levels."""

from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
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
