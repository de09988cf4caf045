"""Keyed random numbers once more, in Python's own integers: splitmix64 of the place and the key."""

import hashlib
import math

MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """splitmix64's finaliser after its increment."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def place(seed: int, step: int, stream: str, layer: int, pass_index: int = 0) -> int:
    """64 bits that stand for one stream."""
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    value = mix(seed & MASK)
    for part in (step, name, layer, pass_index):
        value = mix(value ^ (part & MASK))
    return value


def bits(where: int, key: int) -> int:
    """64 random bits of an integer key."""
    return mix(mix(key & MASK) ^ where)


def uniform(where: int, key: int) -> float:
    """In (0, 1): 52 bits and a half."""
    return ((bits(where, key) >> 12) + 0.5) * 2.0**-52


def uniform_row(where: int, key: int, columns: int) -> list[float]:
    """Several for one key."""
    return [uniform(where, mix(key & MASK) + column) for column in range(columns)]


def normal(where: int, key: int) -> float:
    """Standard normal."""
    return inverse_normal(uniform(where, key))


def inverse_normal(share: float) -> float:
    """Where the normal distribution function is `share`, by bisection."""
    low, high = -40.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2
