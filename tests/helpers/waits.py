"""Count where a computation waits for its device, without a GPU.

A value that the host reads (`.item()`, `if tensor:`, `.cpu()`, a boolean index) and a table that the host sends
(`torch.tensor(...)`, `new_tensor`, `.to(device)`) both stop a GPU's queue. On the CPU all but `.to(device)` show; with
everything on the device "meta", which stands for a GPU, that one does as well.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


PLACES = (str(Path(torch.__file__).parent), __file__)
aten = torch.ops.aten
SENT = ("tensor", "new_tensor", "lift_fresh.default")  # lift_fresh: from_numpy, FloatTensor(...)
SENT_UNLESS_A_TENSOR = ("as_tensor", "asarray")
READ = ("cpu", "numpy", "tolist")
READ_OPERATIONS = {  # .item(), bool(), float(), comparisons for `if`, results whose size is a value
    aten._local_scalar_dense, aten.equal, aten.allclose, aten.is_nonzero, aten.nonzero, aten.masked_select,
    aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.repeat_interleave,
}  # fmt: skip


class _Seen:
    def __init__(self) -> None:
        self.found: list[str] = []
        self.inside = False  # of a counted function, whose operations are not counted again

    def add(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith(PLACES)]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        self.found.append(what + place)


class _Functions(TorchFunctionMode):
    def __init__(self, seen: _Seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        is_sent = name in SENT or name in SENT_UNLESS_A_TENSOR and not isinstance(args[0], torch.Tensor)
        if not is_sent and name not in READ:
            return function(*args, **(kwargs or {}))
        self.seen.add(name.removesuffix(".default"))
        self.seen.inside = True
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.seen.inside = False


class _Operations(TorchDispatchMode):
    def __init__(self, seen: _Seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not self.seen.inside and self._waits(operation, args, kwargs or {}):
            self.seen.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))

    @staticmethod
    def _waits(operation, args, kwargs):
        packet = operation.overloadpacket
        if packet in (aten.index, aten.index_put, aten.index_put_):
            indices = [index for index in args[1] if index is not None]
            return any(i.dtype in (torch.bool, torch.uint8) or i.device != args[0].device for i in indices)
        if packet is aten._to_copy:
            return kwargs.get("device") not in (None, args[0].device)
        if packet is aten.copy_:
            return args[1].device != args[0].device
        return packet in READ_OPERATIONS


@contextmanager
def waits() -> Iterator[list[str]]:
    """Yield a list that gets an entry "what at file:line" for each wait inside the block."""
    seen = _Seen()
    with _Operations(seen), _Functions(seen):
        yield seen.found


@contextmanager
def stand_in(monkeypatch) -> Iterator[torch.device]:
    """Context in which the device "meta", which it yields, stands for a GPU: autocast accepts it, and does nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
        yield torch.device("meta")
