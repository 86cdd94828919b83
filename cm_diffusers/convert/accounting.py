"""Strict mapping of a checkpoint's tensors to a network's weights: nothing missing, nothing left over."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


SHOWN = 8  # names in an error


class Ledger:
    """A checkpoint's tensors, each of which must be used once, and the network's weights made from them.

    Args:
        tensors: the tensors (of any shape) by their names in the checkpoint.
        prefix: common start of these names.
    """

    def __init__(self, tensors: dict[str, Tensor], prefix: str = ""):
        self.left, self.prefix = dict(tensors), prefix
        self.missing: list[str] = []
        self.weights: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor | None:
        """Take the tensor `name` out; if it is not there, note it as missing and return None."""
        tensor = self.left.pop(self.prefix + name, None)
        if tensor is None:
            self.missing.append(self.prefix + name)
        return tensor

    def copy(
        self,
        source: str,
        target: str,
        change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        parts: Sequence[str] = ("weight", "bias"),
    ) -> None:
        """Use the tensors of the layer `source` for the layer `target`.

        Args:
            source: name of the layer in the checkpoint, without the prefix.
            target: name of the layer in the network.
            change: applied to each tensor.
            parts: the tensors of the layer.
        """
        for part in parts:
            tensor = self.take(f"{source}.{part}")
            if tensor is not None:
                self.weights[f"{target}.{part}"] = change(tensor)

    def join(self, first: str, second: str, target: str) -> None:
        """Join two linear layers with summed outputs into one layer, `target`, of the concatenated inputs.

        `first` and `second` are the layers' names in the checkpoint, without the prefix.
        """
        self.copy(first, target)
        self.copy(second, ".second")
        second_weight, second_bias = (self.weights.pop(f".second.{part}", None) for part in ("weight", "bias"))
        if second_weight is not None and f"{target}.weight" in self.weights:
            self.weights[f"{target}.weight"] = torch.cat([self.weights[f"{target}.weight"], second_weight], 1)
        if second_bias is not None and f"{target}.bias" in self.weights:
            self.weights[f"{target}.bias"] = self.weights[f"{target}.bias"] + second_bias

    def fill(self, network: nn.Module, family: str) -> None:
        """Load the weights into `network`, in float32, and switch it to eval mode.

        `family` describes the checkpoint in messages.

        Raises:
            ValueError: tensors are missing, left over, of another shape, or not finite.
        """
        wanted = network.state_dict()
        problems = {
            "missing": self.missing,
            "unexpected": list(self.left),
            "of another shape": [
                f"{name} {tuple(tensor.shape)} for {tuple(wanted[name].shape)}"
                for name, tensor in self.weights.items()
                if name in wanted and tensor.shape != wanted[name].shape
            ],
            "without a place": [name for name in self.weights if name not in wanted],
            "not filled": [] if self.missing else [name for name in wanted if name not in self.weights],
            "not finite": [name for name, tensor in self.weights.items() if not tensor.isfinite().all()],
        }
        problems = {what: names for what, names in problems.items() if names}
        if problems:
            lists = "; ".join(f"{len(names)} {what}: {_shown(names)}" for what, names in problems.items())
            raise ValueError(
                f"This looks like {family}, but its tensors don't add up. {lists}. Nothing was written: the file is"
                " damaged, or its network has unsupported options."
            )
        network.load_state_dict({name: tensor.float() for name, tensor in self.weights.items()})
        network.eval()


def _shown(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def ordered_qkv(tensor: Tensor, head_dim: int, order: str) -> Tensor:
    """Reorder the rows of a layer that outputs queries, keys and values: all q, then all k, then all v.

    Args:
        tensor: weight or bias of the layer, of any shape (3 C, ...).
        head_dim: channels per head.
        order: order of the given rows. "new" needs no change; "legacy" has q, k, v of each head in turn;
            "interleaved" has q, k, v of each channel of each head in turn.
    """
    if order == "new" or len(tensor) % (3 * head_dim):  # `fill` reports a wrong size
        return tensor
    if order == "legacy":
        parts = tensor.reshape(-1, 3, head_dim, *tensor.shape[1:]).transpose(0, 1)
    else:
        parts = tensor.reshape(-1, head_dim, 3, *tensor.shape[1:]).movedim(2, 0)
    return parts.reshape(tensor.shape)
