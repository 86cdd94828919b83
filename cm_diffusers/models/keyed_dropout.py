"""Dropout with one mask key per sample, so that a batch can be split over processes in any way."""

import math

import torch
from torch import Tensor, nn

from cm_diffusers.core.counter_hash import GAMMA, mix, stream


MASK_RULE = 2  # the newest rule from keys to masks
COLUMNS = 256  # elements that share their row's factor and offset in rule 2


def kept_by_hash(keys: Tensor, layer: int, count: int, p: float) -> Tensor:
    """The elements that stay by rule 1, that of the first runs, bool (B, `count`).

    Element i of a sample reads mix(mix(mix(key + gamma) ^ layer) ^ i), where mix is the finaliser of splitmix64.

    Args:
        keys: int64 (B,), one per sample.
        layer: index of the layer.
        count: elements per sample.
        p: dropout probability in (0, 1).
    """
    state = mix(mix(keys + GAMMA) ^ layer)
    # signed numbers are uniform on [-2^63, 2^63)
    return mix(state[:, None] ^ torch.arange(count, device=keys.device)) >= math.floor((p - 0.5) * 2**64)


def kept_by_products(keys: Tensor, layer: int, count: int, p: float) -> Tensor:
    """The elements that stay by rule 2, bool (B, `count`), with a twelfth of the memory traffic of rule 1.

    The elements of a sample fill a table of 256 columns, row by row. Element (i, j) reads a_i + b_i c_j mod 2^32, with
    random a, b and c: rows are independent, and so are any two elements of a row (Dietzfelbinger 1996). The numbers c,
    then a and b of each row, are halves of 64-bit numbers, from the sample's stream for this layer.

    Args:
        keys: int64 (B,), one per sample.
        layer: index of the layer.
        count: elements per sample.
        p: dropout probability in (0, 1).
    """
    rows = -(-count // COLUMNS)
    random = stream(keys, COLUMNS // 2 + rows, part=layer).view(torch.int32)
    c, a, b = random[:, None, :COLUMNS], random[:, COLUMNS::2, None], random[:, COLUMNS + 1 :: 2, None]
    # signed numbers are uniform on [-2^31, 2^31)
    return torch.addcmul(a, b, c).flatten(1)[:, :count] >= math.floor((p - 0.5) * 2**32)


class KeyedDropout(nn.Dropout):
    """Dropout whose mask can depend on the sample's key, the layer's index and the position alone.

    Masks come from integers, so they are the same on every device and in a batch of any size.

    Args:
        p: dropout probability in [0, 1].
        layer: index of the layer in its network.
    """

    def __init__(self, p: float, layer: int = 0):
        super().__init__(p)
        self.layer, self.rule = layer, MASK_RULE

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Drop elements of `x` (B, ...) in training mode.

        `keys` (B,), int64, are on the device of `x`. None draws ordinary dropout.
        """
        if keys is None or not self.training or self.p == 0:
            return super().forward(x)
        if self.p == 1:
            return x * 0
        kept = kept_by_hash if self.rule == 1 else kept_by_products
        mask = kept(keys, self.layer, x[0].numel(), self.p).view(x.shape)
        if self.rule == 1:
            return x * (mask.to(x.dtype) / (1 - self.p))
        # one kernel, which saves the bool mask; the gradient's factor is float32 unless the mask is float64
        mask = mask.double() if x.dtype == torch.float64 else mask
        return torch.addcmul(torch.zeros((), dtype=x.dtype, device=x.device), x, mask, value=1 / (1 - self.p))


class KeyedDropoutMixin:
    """A mixin for networks with `KeyedDropout` layers: it holds the keys of the coming batches."""

    _keys: Tensor | None = None
    _rule = MASK_RULE

    def _number_dropout(self) -> None:
        """Number the layers, so that each has different masks. Call it when all layers exist."""
        for layer, module in enumerate(m for m in self.modules() if isinstance(m, KeyedDropout)):
            module.layer = layer

    def key_dropout(self, keys: Tensor | None, rule: int = MASK_RULE) -> None:
        """Set the dropout `keys` (B,), int64, of the coming batches in training mode, one per sample.

        Args:
            keys: random integers; None restores ordinary dropout.
            rule: how keys become masks, 1 (`kept_by_hash`) or 2 (`kept_by_products`).

        Raises:
            ValueError: `keys` is not one int64 per sample.
        """
        if keys is not None and (keys.dtype != torch.int64 or keys.ndim != 1):
            raise ValueError(f"Dropout keys must be int64 (B,), not {keys.dtype} {tuple(keys.shape)}.")
        self._keys = keys
        if keys is not None and rule != self._rule:
            self._rule = rule
            for module in self.modules():
                if isinstance(module, KeyedDropout):
                    module.rule = rule

    def _keys_of(self, sample: Tensor) -> Tensor | None:
        """The keys for the batch `sample`, on its device; None if dropout is ordinary or off.

        If `sample` concatenates several batches of the keyed size, the keys repeat for each.

        Raises:
            ValueError: the batch size is not a multiple of the number of keys.
        """
        if self._keys is None or not (self.training and self.config.dropout):
            return None
        times, rest = divmod(sample.shape[0], len(self._keys))
        if rest:
            raise ValueError(
                f"There are dropout keys for {len(self._keys)} samples, but the batch has {sample.shape[0]}."
                " Call key_dropout with one key per sample."
            )
        return self._keys.to(sample.device).repeat(times)
