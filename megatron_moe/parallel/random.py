"""Random numbers as a pure function of who asks: no generator, no state, the same on every layout.

A draw is splitmix64 of (seed, step, stream, layer, pass) and of integers that the caller gives: a token's key, an
element's global index. Recomputation, pipelining and resuming therefore repeat it without storing anything.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def signed(value: int) -> int:
    """Modulo 2^64, as int64 holds it."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


GOLDEN = signed(_STEP)  # odd: its multiples are all different


def _mix_int(value: int) -> int:
    value = (value + _STEP) & _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: clear the copied sign bits
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix_(value: Tensor) -> Tensor:
    """splitmix64's last steps, in place, without the first addition: one to one on int64."""
    value ^= _shift(value, 30)
    value *= signed(_MIX1)
    value ^= _shift(value, 27)
    value *= signed(_MIX2)
    value ^= _shift(value, 31)
    return value


def _mix(value: Tensor) -> Tensor:
    return mix_(value + GOLDEN)


def name_key(name: str) -> int:
    """A stable 64-bit number for a name (blake2b, the same in every process and version)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class KeyedRandom:
    """A stream of draws; say where you are with `at`, then ask with integer keys."""

    seed: int
    step: int = 0
    stream: str = ""
    layer: int = 0
    pass_index: int = 0  # THOR runs the same tokens twice, with other draws

    def at(
        self,
        *,
        step: int | None = None,
        stream: str | None = None,
        layer: int | None = None,
        pass_index: int | None = None,
    ) -> "KeyedRandom":
        """The same stream elsewhere."""
        return replace(
            self,
            step=self.step if step is None else step,
            stream=self.stream if stream is None else stream,
            layer=self.layer if layer is None else layer,
            pass_index=self.pass_index if pass_index is None else pass_index,
        )

    def key(self) -> int:
        """64 bits that stand for this place."""
        value = _mix_int(self.seed & _MASK)
        for part in (self.step, name_key(self.stream), self.layer, self.pass_index):
            value = _mix_int(value ^ (part & _MASK))
        return value

    def bits(self, keys: Tensor) -> Tensor:
        """64 random bits for each key, as int64 of the same shape."""
        return _mix(_mix(keys) ^ signed(self.key()))

    def uniform(self, keys: Tensor) -> Tensor:
        """float64 in (0, 1), never 0 or 1, one for each key."""
        # 52 bits and a half: the largest is still below 1 in float64
        return (_shift(self.bits(keys), 12).to(torch.float64) + 0.5) * 2.0**-52

    def uniform_rows(self, keys: Tensor, columns: int) -> Tensor:
        """(len(keys), columns) float64 in (0, 1): `columns` draws for each key."""
        index = torch.arange(columns, device=keys.device, dtype=torch.int64)
        return self.uniform(_mix(keys)[:, None] + index)

    def normal(self, keys: Tensor) -> Tensor:
        """float64 standard normal, one for each key, by the inverse of the distribution function."""
        drawn: Tensor = torch.special.erfinv(2.0 * self.uniform(keys) - 1.0) * math.sqrt(2.0)
        return drawn
