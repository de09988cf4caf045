"""A communicator around another one, which sees every collective that is started."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator, Pending, Starting


class Wrapped(Starting):
    """Does what `inner` does; a subclass says how its collectives arrive. All else passes at once."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    @abstractmethod
    def arriving(self, arrival: Arrival) -> Arrival:
        """What is returned instead of a collective that was just started."""

    def start_all_reduce_(self, tensor: Tensor, op: str = "sum") -> Arrival:
        return self.arriving(self.inner.start_all_reduce_(tensor, op))

    def start_all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        return self.arriving(self.inner.start_all_gather(tensor, rows))

    def start_all_gather_(self, whole: Tensor, own: Tensor) -> Arrival:
        return self.arriving(self.inner.start_all_gather_(whole, own))

    def start_reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        return self.arriving(self.inner.start_reduce_scatter(tensor, rows))

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        return self.arriving(self.inner.start_all_to_all(tensor, send, receive))

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
