"""Gathers and sums that travel in pieces, beside the work that uses or makes them; without gradients.

Each rank's rows go straight to the rank that needs them, by exchanges in which every rank sends to one other and
receives from one other. All ranks start the same collectives in the same order, so that on no backend anybody waits
for somebody who waits, and uneven shares need no padding. Pieces of a sum are added in one order.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from torch import Tensor

from megatron_moe.parallel.arrival import Arrival, Joined
from megatron_moe.parallel.collectives import shares
from megatron_moe.parallel.state import Axis

Make = Callable[[slice], Tensor]  # some rows of a whole, by where they stand in it

# of a sum that all ranks need whole: only the last piece travels beside nothing, and rows are still many in each
PIECES = 4


def places(rows: Sequence[int]) -> list[slice]:
    """Where each share stands in the whole."""
    return [slice(stop - number, stop) for number, stop in zip(rows, accumulate(rows), strict=True)]


def rows_as_they_come(own: Tensor, axis: Axis, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Each rank and its rows, the own ones first; the others' are on their way from the beginning.

    own: this rank's rows, to be left alone.   rows[r]: how many rank r brings.
    """
    arrivals = {}
    for distance in range(1, axis.size):
        source = (axis.rank - distance) % axis.size
        arrivals[source] = _pass_on(own, axis, distance, rows[source])
    yield axis.rank, own
    for source, arrival in arrivals.items():
        yield source, arrival.wait()


def start_split_sum(make: Make, axis: Axis, rows: Sequence[int]) -> Arrival:
    """The sum over the ranks of what they make, of which each keeps its rows.

    make: called for each rank's rows, for the own ones last; what it returns is sent, or added to.   rows[r]: how many
    rank r keeps.
    """
    parts, own_place = places(rows), axis.rank
    arrivals = []
    for distance in range(1, axis.size):
        part = make(parts[(own_place + distance) % axis.size])
        arrivals.append(_pass_on(part, axis, distance, rows[own_place]))
    own = make(parts[own_place])

    def add(others: Sequence[Tensor]) -> Tensor:
        for other in others:
            own.add_(other)
        return own

    return Joined(arrivals, add)


def start_whole_sum(whole: Tensor, fill: Make, axis: Axis) -> Arrival:
    """The sum over the ranks of what they fill `whole` with, in place.

    fill: writes some rows of `whole` and returns them.
    """
    parts = [part for part in places(shares(whole.shape[0], PIECES)) if part.start < part.stop]
    arrivals = [axis.comm.start_all_reduce_(fill(part)) for part in parts]
    return Joined(arrivals, lambda filled: whole)


def _pass_on(tensor: Tensor, axis: Axis, distance: int, rows: int) -> Arrival:
    """To the rank so far after this one; what comes is `rows` rows of the one so far before it."""
    send, receive = [0] * axis.size, [0] * axis.size
    send[(axis.rank + distance) % axis.size] = tensor.shape[0]
    receive[(axis.rank - distance) % axis.size] = rows
    return axis.comm.start_all_to_all(tensor, send, receive)
