"""A communicator around another one, which notes what it starts and how long it waits, for whoever watches the rank."""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import fields, replace

from torch import Tensor

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator, Pending, Starting
from megatron_moe.parallel.state import ParallelState


class Notes(ABC):
    """Where collectives are noted. Called several times a layer: each call may take a microsecond, not more."""

    @abstractmethod
    def starts(self, axis: str, kind: str) -> None:
        """A collective or message begins."""

    @abstractmethod
    def waits(self) -> None:
        """The host waits for one, from now on."""

    @abstractmethod
    def arrived(self, seconds: float) -> None:
        """It is over, after so many seconds of waiting."""


class Noted(Starting):
    """Does what `inner` does, and notes it."""

    def __init__(self, inner: Communicator, axis: str, notes: Notes) -> None:
        self._inner = inner
        self._axis = axis
        self._notes = notes

    def start_all_reduce_(self, tensor: Tensor, op: str = "sum") -> Arrival:
        self._notes.starts(self._axis, "all_reduce")
        return _NotedArrival(self._inner.start_all_reduce_(tensor, op), self._notes)

    def start_all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        self._notes.starts(self._axis, "all_gather")
        return _NotedArrival(self._inner.start_all_gather(tensor, rows), self._notes)

    def start_all_gather_(self, whole: Tensor, own: Tensor) -> Arrival:
        self._notes.starts(self._axis, "all_gather")
        return _NotedArrival(self._inner.start_all_gather_(whole, own), self._notes)

    def start_reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        self._notes.starts(self._axis, "reduce_scatter")
        return _NotedArrival(self._inner.start_reduce_scatter(tensor, rows), self._notes)

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        self._notes.starts(self._axis, "all_to_all")
        return _NotedArrival(self._inner.start_all_to_all(tensor, send, receive), self._notes)

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        self._notes.starts(self._axis, "broadcast")
        with _Waiting(self._notes):
            return self._inner.broadcast_(tensor, source)

    def barrier(self) -> None:
        self._notes.starts(self._axis, "barrier")
        with _Waiting(self._notes):
            self._inner.barrier()

    def send(self, tensor: Tensor, to: int) -> Pending:
        self._notes.starts(self._axis, "send")
        return _NotedPending(self._inner.send(tensor, to), self._notes)

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        self._notes.starts(self._axis, "receive")
        return _NotedPending(self._inner.receive_(tensor, source), self._notes)

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        self._notes.starts(self._axis, "send_receive")
        return _NotedPending(self._inner.send_receive_(tensor, to, received, source), self._notes)


class _Waiting:
    """The host waits while the block runs."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def __enter__(self) -> None:
        self._notes.waits()
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # what failed has not arrived: the rank is still where it was
        if kind is None:
            self._notes.arrived(time.perf_counter() - self._began)


class _NotedArrival(Arrival):
    def __init__(self, inner: Arrival, notes: Notes) -> None:
        self._inner = inner
        self._notes = notes

    def wait(self) -> Tensor:
        self._notes.waits()
        began = time.perf_counter()
        tensor = self._inner.wait()
        self._notes.arrived(time.perf_counter() - began)
        return tensor

    def is_here(self) -> bool:
        return self._inner.is_here()


class _NotedPending(Pending):
    def __init__(self, inner: Pending, notes: Notes) -> None:
        self._inner = inner
        self._notes = notes

    def wait(self) -> None:
        with _Waiting(self._notes):
            self._inner.wait()

    def is_over(self) -> bool:
        return self._inner.is_over()


def noted(state: ParallelState, notes: Notes, plain: Collection[str] = ()) -> ParallelState:
    """The same ranks; what they send along any axis but the `plain` ones is noted."""
    axes = {field.name: state.axis(field.name) for field in fields(state)}
    return replace(
        state,
        **{
            name: replace(axis, comm=Noted(axis.comm, name, notes))
            for name, axis in axes.items()
            if axis.size > 1 and name not in plain
        },
    )
