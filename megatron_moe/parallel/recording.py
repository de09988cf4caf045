"""A world of which only one rank is there: what would be sent is counted, and no process group is needed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_moe.parallel.communicator import Communicator, Done, Pending


@dataclass
class Tally:
    """What was sent along one axis: calls, bytes that leave this rank, and those of the largest call, by kind."""

    calls: dict[str, int] = field(default_factory=dict)
    sent_bytes: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, sent: int, times: int = 1) -> None:
        """So many calls that send so many bytes each."""
        self.calls[kind] = self.calls.get(kind, 0) + times
        self.sent_bytes[kind] = self.sent_bytes.get(kind, 0) + times * sent
        self.largest[kind] = max(self.largest.get(kind, 0), sent)

    @property
    def total_bytes(self) -> int:
        return sum(self.sent_bytes.values())

    def forget(self) -> None:
        """Begin again."""
        for counted in (self.calls, self.sent_bytes, self.largest):
            counted.clear()


def _bytes(tensor: Tensor, rows: int | None = None) -> int:
    whole = tensor.numel() * tensor.element_size()
    return whole if rows is None else whole * rows // max(1, tensor.shape[0])


def _repeated(tensor: Tensor, rows: int) -> Tensor:
    """So many rows, the given ones over and over."""
    own = tensor.shape[0]
    if not own:
        return tensor.new_zeros((rows, *tensor.shape[1:]))
    return tensor.repeat(-(-rows // own), *[1] * (tensor.dim() - 1))[:rows]


class Recording(Communicator):
    """No ranks at all: counts what would be sent, and answers as if all others brought what this one brings.

    What comes from a neighbour is zero, and sums are not taken: so the numbers of a step stay numbers.

    Bytes are those that a bandwidth-optimal (ring) algorithm sends from one rank: (n-1)/n of a tensor for a gather, a
    scatter or an exchange, twice that for an all-reduce.
    """

    def __init__(self, size: int, rank: int, tally: Tally) -> None:
        self._size = size
        self._rank = rank
        self.tally = tally

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        self.tally.add("all_reduce", 2 * _bytes(tensor) * (self._size - 1) // self._size)
        return tensor

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        self.tally.add("all_gather", _bytes(tensor) * (self._size - 1))
        return _repeated(tensor, sum(rows))

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        self.tally.add("reduce_scatter", _bytes(tensor, sum(rows) - rows[self._rank]))
        return tensor[: rows[self._rank]].clone()

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        self.tally.add("all_to_all", _bytes(tensor, sum(send) - send[self._rank]))
        return _repeated(tensor, sum(receive))

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        self.tally.add("broadcast", _bytes(tensor) if source == self._rank else 0)
        return tensor

    def send(self, tensor: Tensor, to: int) -> Pending:
        self.tally.add("send", _bytes(tensor))
        return Done()

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        self.tally.add("receive", 0)
        tensor.zero_()
        return Done()

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        self.tally.add("send_receive", _bytes(tensor))
        received.zero_()
        return Done()

    def barrier(self) -> None:
        self.tally.add("barrier", 0)
