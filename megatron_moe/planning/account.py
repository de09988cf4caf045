"""What one rank sends along each axis by formula, in the words in which a recording communicator counts."""

from megatron_moe.parallel.recording import Tally
from megatron_moe.parallel.state import ParallelState


class Account:
    """Tallies of one rank's axes. An axis of one rank sends nothing; `times` calls of the same size are one entry.

    Sizes are bytes. A ring sends (n-1)/n of a whole tensor in a gather or a scatter, and twice that in an all-reduce.
    """

    def __init__(self, state: ParallelState) -> None:
        self._state = state
        self.tallies: dict[str, Tally] = {}

    def _add(self, axis: str, kind: str, sent: int, times: int) -> None:
        if self._state.axis(axis).size > 1 and times:
            self.tallies.setdefault(axis, Tally()).add(kind, sent, times)

    def all_reduce(self, axis: str, whole: int, times: int = 1) -> None:
        size = self._state.axis(axis).size
        self._add(axis, "all_reduce", 2 * whole * (size - 1) // size, times)

    def all_gather(self, axis: str, own: int, times: int = 1) -> None:
        self._add(axis, "all_gather", own * (self._state.axis(axis).size - 1), times)

    def reduce_scatter(self, axis: str, whole: int, own: int, times: int = 1) -> None:
        """own: what this rank keeps of it."""
        self._add(axis, "reduce_scatter", whole - own, times)

    def exchange(self, axis: str, own: int, times: int = 1) -> None:
        """Of what this rank has, an equal part for each rank."""
        size = self._state.axis(axis).size
        self._add(axis, "all_to_all", own - own // size, times)

    def pass_on(self, axis: str, sent: int, times: int = 1) -> None:
        """To a neighbour of the pipeline."""
        self._add(axis, "send", sent, times)

    def take(self, axis: str, times: int = 1) -> None:
        """From a neighbour: the other end counts the bytes."""
        self._add(axis, "receive", 0, times)
