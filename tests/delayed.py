"""A communicator whose collectives arrive late, as over a slow network: what is computed meanwhile hides it."""

import time
from collections.abc import Sequence

from torch import Tensor

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator, Pending


class _Late(Arrival):
    def __init__(self, inner: Arrival, ready: float) -> None:
        self._inner = inner
        self._ready = ready

    def wait(self) -> Tensor:
        found = self._inner.wait()
        time.sleep(max(0.0, self._ready - time.monotonic()))
        return found


class Delayed(Communicator):
    """Each collective takes at least `seconds` from its start.   calls: how many did."""

    def __init__(self, inner: Communicator, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds
        self.calls = 0

    def _late(self, arrival: Arrival) -> Arrival:
        self.calls += 1
        return _Late(arrival, time.monotonic() + self._seconds)

    def start_all_reduce_(self, tensor: Tensor, op: str = "sum") -> Arrival:
        return self._late(self._inner.start_all_reduce_(tensor, op))

    def start_all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        return self._late(self._inner.start_all_gather(tensor, rows))

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
