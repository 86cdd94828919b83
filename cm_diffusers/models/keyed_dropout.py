"""Dropout with one mask key per sample, so that a batch can be split over processes in any way."""

import math

import torch
from torch import Tensor, nn


GAMMA = 0x9E3779B97F4A7C15 - 2**64  # increment of splitmix64 as int64; without it key 0 would mix to 0


def _mix(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 (Steele, Lea & Flood 2014) to int64 in place; products wrap around."""
    # int64 shifts copy the sign; the masks make them logical shifts
    z ^= (z >> 30) & (2**34 - 1)
    z *= 0xBF58476D1CE4E5B9 - 2**64
    z ^= (z >> 27) & (2**37 - 1)
    z *= 0x94D049BB133111EB - 2**64
    z ^= (z >> 31) & (2**33 - 1)
    return z


class KeyedDropout(nn.Dropout):
    """Dropout whose mask can depend on the sample's key, the layer's index and the position alone.

    Element i of a sample reads the number mix(mix(mix(key + gamma) ^ layer) ^ i), where mix is the finaliser of
    splitmix64. These are integers, so the mask is the same on every device and in a batch of any size.

    Args:
        p: dropout probability in [0, 1].
        layer: index of the layer in its network.
    """

    def __init__(self, p: float, layer: int = 0):
        super().__init__(p)
        self.layer = layer

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Drop elements of `x` (B, ...) in training mode.

        `keys` (B,), int64, are on the device of `x`. None draws ordinary dropout.
        """
        if keys is None or not self.training or self.p == 0:
            return super().forward(x)
        if self.p == 1:
            return x * 0
        state = _mix(_mix(keys + GAMMA) ^ self.layer)
        # signed numbers are uniform on [-2^63, 2^63)
        kept = _mix(state[:, None] ^ torch.arange(x[0].numel(), device=x.device)) >= math.floor((self.p - 0.5) * 2**64)
        return x * (kept.view(x.shape).to(x.dtype) / (1 - self.p))


class KeyedDropoutMixin:
    """A mixin for networks with `KeyedDropout` layers: it holds the keys of the coming batches."""

    _keys: Tensor | None = None

    def _number_dropout(self) -> None:
        """Number the layers, so that each has different masks. Call it when all layers exist."""
        for layer, module in enumerate(m for m in self.modules() if isinstance(m, KeyedDropout)):
            module.layer = layer

    def key_dropout(self, keys: Tensor | None) -> None:
        """Set the dropout `keys` (B,), int64, of the coming batches in training mode, one per sample.

        None restores ordinary dropout.

        Raises:
            ValueError: `keys` is not one int64 per sample.
        """
        if keys is not None and (keys.dtype != torch.int64 or keys.ndim != 1):
            raise ValueError(f"Dropout keys must be int64 (B,), not {keys.dtype} {tuple(keys.shape)}.")
        self._keys = keys

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
