"""A slow network: collectives that arrive no earlier than so long after they were started."""

import time
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator
from megatron_moe.parallel.state import Axis
from megatron_moe.parallel.wrapped import Wrapped


class Clock(Protocol):
    """What time it is, and waiting, in seconds."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class OwnTime:
    """Time that passes by sleeping alone, on one rank: nothing that the machine does takes any.

    Where all ranks do the same, each one's own time is that of all.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float, /) -> None:
        self._now += seconds


class _Late(Arrival):
    """Another one, not before its time."""

    def __init__(self, inner: Arrival, comm: "Delayed") -> None:
        self._inner = inner
        self._comm = comm
        self._due = comm.clock.monotonic() + comm.seconds

    def wait(self) -> Tensor:
        # before the other ranks are waited for: what is slept away is the delay's part alone, however loaded they are
        missing = self._due - self._comm.clock.monotonic()
        if missing > 0:
            self._comm.slept += missing
            self._comm.clock.sleep(missing)
        return self._inner.wait()

    def is_here(self) -> bool:
        return self._comm.clock.monotonic() >= self._due


class Delayed(Wrapped):
    """What `inner` does, but no collective arrives earlier than `seconds` after its start.

    delayed: how many collectives there were.   slept: seconds that were lost to it, of delayed x seconds; what was
    computed between a start and its wait is not lost.
    Tensors from one rank to one other, broadcasts and barriers pass at once.
    """

    def __init__(self, inner: Communicator, seconds: float, clock: Clock = time) -> None:
        super().__init__(inner)
        self.seconds = seconds
        self.clock = clock
        self.delayed = 0
        self.slept = 0.0

    def arriving(self, arrival: Arrival) -> Arrival:
        self.delayed += 1
        return _Late(arrival, self)


def late(axis: Axis, seconds: float) -> tuple[Axis, Delayed]:
    """The same ranks, talking slowly; also returns what counts that."""
    comm = Delayed(axis.comm, seconds)
    return replace(axis, comm=comm), comm
