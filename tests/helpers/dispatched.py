"""Watch the operations that PyTorch dispatches: their devices, and how many bytes they move."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dispatched(TorchDispatchMode):
    """Within this context, collect `devices`, the types of device of each operation's tensors, and count `bytes`.

    An operation reads each of its arguments and writes each of its results once. Views move nothing.
    """

    def __init__(self):
        super().__init__()
        self.devices, self.bytes, self.kernels = [], 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(v) if isinstance(t, torch.Tensor)] for v in ((args, kwargs), results))
        self.devices.append({tensor.device.type for tensor in read + written})
        if not operation.is_view and operation.overloadpacket is not torch.ops.aten.empty:
            self.kernels += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in read + written)
        return results
