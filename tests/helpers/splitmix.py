"""The generator splitmix64 with Python's integers."""


def mix(z):
    """The finaliser, on integers from 0 to 2^64 - 1."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def splitmix64(seed, place):
    """Number `place`, from 0, of the stream of `seed`, from 0 to 2^64 - 1."""
    return mix((seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64)


def signed(number, bits=64):
    """The integer with the same `bits` bits in two's complement."""
    return (number + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
