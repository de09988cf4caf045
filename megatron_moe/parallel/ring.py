"""Blocks that travel round the ranks of an axis: each rank sees all of them, and none holds more than two at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.parallel.communicator import Pending
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class Arriving:
    """A tensor that the rank before is sending."""

    tensor: Tensor
    pending: Pending

    def wait(self) -> Tensor:
        self.pending.wait()
        return self.tensor


def pass_on(block: Tensor, axis: Axis) -> Arriving:
    """Starts sending to the next rank, and receiving the same shape from the one before; no gradient.

    The block must not change before the wait.
    """
    received = torch.empty_like(block, memory_format=torch.contiguous_format)
    to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    return Arriving(received, axis.comm.send_receive_(block, to, received, source))


def visitors(block: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """The blocks of all ranks with the rank of each, the own one first; while one is at hand the next is under way."""
    for hop in range(axis.size):
        arriving = pass_on(block, axis) if hop + 1 < axis.size else None
        yield (axis.rank - hop) % axis.size, block
        if arriving is not None:
            block = arriving.wait()


class Homeward:
    """What the ranks add to their visitors travels one hop behind them, and ends with the blocks' owners."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._own: Tensor | None = None
        self._arriving: Arriving | None = None

    def add(self, part: Tensor) -> None:
        """To the visitor at hand, once for each in the order of `visitors`; `part` is given away."""
        if self._own is None:
            self._own = part  # the first visitor is the own block: nothing has to travel
            return
        if self._arriving is not None:
            part += self._arriving.wait()
        self._arriving = pass_on(part, self._axis)

    def total(self) -> Tensor:
        """What all ranks have added to the own block, after the last visitor."""
        assert self._own is not None
        return self._own if self._arriving is None else self._own + self._arriving.wait()
