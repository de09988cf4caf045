"""A communicator whose collectives arrive late, as over a slow network: what is computed meanwhile hides it."""

import time
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator, Pending


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
    def __init__(self, inner: Arrival, ready: float, clock: Clock) -> None:
        self._inner = inner
        self._ready = ready
        self._clock = clock

    def wait(self) -> Tensor:
        found = self._inner.wait()
        self._clock.sleep(max(0.0, self._ready - self._clock.monotonic()))
        return found

    def is_here(self) -> bool:
        return self._clock.monotonic() >= self._ready


class Delayed(Communicator):
    """Each collective takes at least `seconds` from its start.   calls: how many did."""

    def __init__(self, inner: Communicator, seconds: float, clock: Clock = time) -> None:
        self._inner = inner
        self._seconds = seconds
        self._clock = clock
        self.calls = 0

    def _late(self, arrival: Arrival) -> Arrival:
        self.calls += 1
        return _Late(arrival, self._clock.monotonic() + self._seconds, self._clock)

    def start_all_reduce_(self, tensor: Tensor, op: str = "sum") -> Arrival:
        return self._late(self._inner.start_all_reduce_(tensor, op))

    def start_all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        return self._late(self._inner.start_all_gather(tensor, rows))

    def start_all_gather_(self, whole: Tensor, own: Tensor) -> Arrival:
        return self._late(self._inner.start_all_gather_(whole, own))

    def start_reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        return self._late(self._inner.start_reduce_scatter(tensor, rows))

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        return self._late(self._inner.start_all_to_all(tensor, send, receive))

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return self.start_all_reduce_(tensor, op).wait()

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self.start_all_gather(tensor, rows).wait()

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self.start_reduce_scatter(tensor, rows).wait()

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self.start_all_to_all(tensor, send, receive).wait()

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        return self._inner.broadcast_(tensor, source)

    def send(self, tensor: Tensor, to: int) -> Pending:
        return self._inner.send(tensor, to)

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        return self._inner.receive_(tensor, source)

    def barrier(self) -> None:
        self._inner.barrier()
