"""Count the places of a training step where the host waits for the device, or copies to it while the device waits.

On a GPU, torch itself reports such waits. On a CPU they are counted by what Python shows: values of device tensors
that the host reads (`item`, `tolist`, `bool`, ...), and blocking copies of tensors of the host. The host's tensors are
those that were made without a device, and what is made of them alone. Weights and all else are the device's.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "equal", "allclose", "nonzero")
READS += ("masked_select", "unique")
FROM_VALUES = ("tensor", "as_tensor", "new_tensor")  # copy from the host if a device is given
MADE = (*FROM_VALUES, "from_numpy", "empty", "zeros", "ones", "full", "arange", "linspace", "rand", "randn", "randint")
MADE += ("randperm",)
MARK = "_is_of_the_host"


def waits(function: Callable[[], object]) -> Counter[str]:
    """The waits in one call of `function`, by "file:line"."""
    if not torch.cuda.is_available():
        with Watch() as watch:
            function()
        return watch.places
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(_place(w.filename, w.lineno) for w in caught if "synchroniz" in str(w.message))


def mark_host(tensors: Iterable[Any]) -> None:
    """Declare that those of `tensors` that are tensors are the host's, such as the images of a dataset."""
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            setattr(tensor, MARK, True)


class Watch(TorchFunctionMode):
    """Within this mode on a CPU, `places` counts waits by "file:line"."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = bool(given) and all(getattr(tensor, MARK, False) for tensor in given)
        if name in READS and given and not own:
            self._wait()
        out = function(*args, **kwargs)
        if name in ("to", "cpu", "copy_", "__getitem__", "__setitem__"):
            return self._moved(name, out, args, kwargs)
        on_device = isinstance(kwargs.get("device"), torch.device) or name == "new_tensor"
        if name in FROM_VALUES and on_device and not given[1 if name == "new_tensor" else 0 :]:
            self._wait()
        if own or (name in MADE and not given and not on_device):
            mark_host(tree_leaves(out))
        return out

    def _moved(self, name: str, out: Any, args: tuple, kwargs: dict) -> Any:
        """The result of a call that can move a tensor, as a new tensor with the mark of its new place."""
        first, *others = [bool(getattr(x, MARK, False)) for x in tree_leaves(args) if isinstance(x, Tensor)]
        if name == "copy_":
            if first != others[0] and not (kwargs.get("non_blocking") or True in args[2:]):
                self._wait()
            return out
        if name in ("__getitem__", "__setitem__"):
            masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            lists = isinstance(args[1], list)
            if not first and (lists or any(getattr(x, MARK, False) or x.dtype == torch.bool for x in masks)):
                self._wait()
            if first and name == "__getitem__":
                mark_host([out])
            return out
        target = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, str, Tensor))]
        to_host = name == "cpu" or target[:1] == ["cpu"] or (others[:1] == [True])
        if name == "to" and not target:  # another dtype
            mark_host([out] if first else [])
            return out
        if first != to_host and not kwargs.get("non_blocking"):
            self._wait()
        out = out.view(out.shape)  # a tensor of its own, as on a GPU
        mark_host([out] if to_host else [])
        return out

    def _wait(self) -> None:
        frame = sys._getframe(1)
        while frame.f_back and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
            frame = frame.f_back
        self.places[_place(frame.f_code.co_filename, frame.f_lineno)] += 1


def _place(file: str, line: int) -> str:
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"
