"""Dropout whose masks belong to samples, so that a batch may be split over processes in any way."""

import math

import torch
from torch import Tensor, nn


GAMMA = 0x9E3779B97F4A7C15 - 2**64  # the increment of splitmix64, as int64: so that key 0 does not mix to 0


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014) on int64, where products wrap around. Changes `z`."""
    # int64 shifts copy the sign, the masks make them logical
    z ^= (z >> 30) & (2**34 - 1)
    z *= 0xBF58476D1CE4E5B9 - 2**64
    z ^= (z >> 27) & (2**37 - 1)
    z *= 0x94D049BB133111EB - 2**64
    z ^= (z >> 31) & (2**33 - 1)
    return z


class KeyedDropout(nn.Dropout):
    """Dropout that, given keys, masks each sample by (its key, this layer's index, the position) alone.

    Element i of a sample reads the number mix(mix(mix(key + gamma) ^ layer) ^ i), with the finaliser of splitmix64.
    These are integers, so the mask is the same on every device and in a batch of any size.
    """

    def __init__(self, p: float, layer: int = 0):
        super().__init__(p)
        self.layer = layer

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Drop elements of `x` (B, ...) in training mode; `keys` int64 (B,) on its device."""
        if keys is None or not self.training or self.p == 0:
            return super().forward(x)
        if self.p == 1:
            return x * 0
        state = _mix(_mix(keys + GAMMA) ^ self.layer)
        # signed numbers are uniform on [-2^63, 2^63)
        kept = _mix(state[:, None] ^ torch.arange(x[0].numel(), device=x.device)) >= math.floor((self.p - 0.5) * 2**64)
        return x * (kept.view(x.shape).to(x.dtype) / (1 - self.p))


class KeyedDropoutMixin:
    """What a network with layers of `KeyedDropout` has: keys for the coming batches."""

    _keys: Tensor | None = None

    def _number_dropout(self) -> None:
        """Give each layer masks of its own; to be called once all of them are there."""
        for layer, module in enumerate(m for m in self.modules() if isinstance(m, KeyedDropout)):
            module.layer = layer

    def key_dropout(self, keys: Tensor | None) -> None:
        """Draw the dropout of the coming batches in training mode by these keys, int64 (B,), one per sample.

        None goes back to ordinary dropout.

        Raises:
            ValueError: not one int64 per sample.
        """
        if keys is not None and (keys.dtype != torch.int64 or keys.ndim != 1):
            raise ValueError(f"Dropout keys are int64 (B,), not {keys.dtype} {tuple(keys.shape)}.")
        self._keys = keys

    def _keys_of(self, sample: Tensor) -> Tensor | None:
        """The keys for the batch `sample`, on its device; None where dropout is ordinary or off.

        In a batch of whole batches, one after the other, each has the keys anew.

        Raises:
            ValueError: the keys are those of a batch of another size.
        """
        if self._keys is None or not (self.training and self.config.dropout):
            return None
        times, rest = divmod(sample.shape[0], len(self._keys))
        if rest:
            raise ValueError(f"There are dropout keys for {len(self._keys)} samples, the batch has {sample.shape[0]}.")
        return self._keys.to(sample.device).repeat(times)
