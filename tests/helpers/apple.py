"""Simulate a device without float64, such as an Apple GPU, on the CPU under the device name "meta"."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cm_diffusers.core import arrays


DEVICE = torch.device("meta")  # a PyTorch build without mps rejects even simulated tensors on that device


class Apple(torch.Tensor):
    """A tensor on the simulated device; `inner` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, inner):
        settings = {"strides": inner.stride(), "dtype": inner.dtype, "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **settings)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


def _run(operation, args, kwargs):
    device = kwargs.get("device")
    there = device == DEVICE if device is not None else any(isinstance(a, Apple) for a in tree_leaves((args, kwargs)))
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda a: a.inner if isinstance(a, Apple) else a, (args, kwargs))
    return tree_map(_placed if there else lambda value: value, operation(*args, **kwargs))


def _placed(value):
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return Apple(value)


@contextmanager
def without_float64(monkeypatch, *networks):
    """Context that moves `networks` in place to the simulated device and yields that device."""
    monkeypatch.setattr(arrays, "NO_FLOAT64", ("meta",))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # meta has no autocast
    with _Mode():
        for network in networks:
            for module in network.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        moved = torch.nn.Parameter(value.data.to(DEVICE), value.requires_grad)
                        module._parameters[name] = moved
                for name, value in module._buffers.items():
                    if value is not None:
                        module._buffers[name] = value.to(DEVICE)
        yield DEVICE
