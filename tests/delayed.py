"""A slow network: collectives that arrive no earlier than so long after they were started."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator, Pending
from megatron_moe.parallel.state import Axis


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


class Delayed(Communicator):
    """What `inner` does, but no collective arrives earlier than `seconds` after its start.

    delayed: how many collectives there were.   slept: seconds that were lost to it, of delayed x seconds; what was
    computed between a start and its wait is not lost.
    Tensors from one rank to one other, broadcasts and barriers pass at once.
    """

    def __init__(self, inner: Communicator, seconds: float, clock: Clock = time) -> None:
        self.inner = inner
        self.seconds = seconds
        self.clock = clock
        self.delayed = 0
        self.slept = 0.0

    def start_all_reduce_(self, tensor: Tensor, op: str = "sum") -> Arrival:
        return self._late(self.inner.start_all_reduce_(tensor, op))

    def start_all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        return self._late(self.inner.start_all_gather(tensor, rows))

    def start_all_gather_(self, whole: Tensor, own: Tensor) -> Arrival:
        return self._late(self.inner.start_all_gather_(whole, own))

    def start_reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        return self._late(self.inner.start_reduce_scatter(tensor, rows))

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        return self._late(self.inner.start_all_to_all(tensor, send, receive))

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return self.start_all_reduce_(tensor, op).wait()

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self.start_all_gather(tensor, rows).wait()

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self.start_reduce_scatter(tensor, rows).wait()

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self.start_all_to_all(tensor, send, receive).wait()

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        return self.inner.broadcast_(tensor, source)

    def send(self, tensor: Tensor, to: int) -> Pending:
        return self.inner.send(tensor, to)

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        return self.inner.receive_(tensor, source)

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        return self.inner.send_receive_(tensor, to, received, source)

    def barrier(self) -> None:
        self.inner.barrier()

    def _late(self, arrival: Arrival) -> Arrival:
        self.delayed += 1
        return _Late(arrival, self)


def late(axis: Axis, seconds: float) -> tuple[Axis, Delayed]:
    """The same ranks, talking slowly; also returns what counts that."""
    comm = Delayed(axis.comm, seconds)
    return replace(axis, comm=comm), comm
