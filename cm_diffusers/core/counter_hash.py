"""Random integers by position: each number is a function of a stream's seed and of its place in the stream.

This is the generator splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195): after i numbers its state is
seed + i gamma. Numbers are int64, and products wrap around, so they are the same on every device.
"""

import torch
from torch import Tensor


GAMMA = 0x9E3779B97F4A7C15 - 2**64  # the increment, as int64


def mix(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 to `z` (any shape, int64) in place, and return it."""
    # int64 shifts copy the sign; the masks make them logical shifts
    z ^= (z >> 30).bitwise_and_(2**34 - 1)
    z *= 0xBF58476D1CE4E5B9 - 2**64
    z ^= (z >> 27).bitwise_and_(2**37 - 1)
    z *= 0x94D049BB133111EB - 2**64
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    return z


def stream(seeds: Tensor, count: int, part: int = 0) -> Tensor:
    """Return the first `count` numbers of each stream, or of one of its parts, on the device of `seeds`.

    Args:
        seeds: int64 (B,), one per stream.
        count: numbers per stream, fewer than 2^32.
        part: parts begin at multiples of 2^32.

    Returns:
        int64 (B, `count`), uniform on all 64-bit integers.
    """
    # by |, not +: torch.compile takes products of sums of indices for index arithmetic, which must not wrap around
    places = torch.arange(1, count + 1, device=seeds.device) | part << 32
    return mix(seeds[:, None] + places * GAMMA)
