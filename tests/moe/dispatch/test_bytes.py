"""What each dispatcher puts on the wire in one layer, forward and backward: bytes that leave a rank, to the last one.

T tokens on each rank, K choices of each, H wide, a row's element s bytes, a weight's w; EP ranks share the experts, on
M nodes of N = EP/M, each expert cut in P = ETP. D(G) = G (1 - C(E - E/G, K) / C(E, K)): on how many of G ranks, or
nodes, K experts stand, if every set of K is equally likely. Of four transfers rows make up:

    local          nothing
    alltoall       ep 4·K·T·(EP-1)/EP·s·H                etp 4·(P-1)·K·T·s·H
    allgather      ep 2·(EP-1)·P·T·(s + w)·H             etp 2·(P-1)·T·(s + w)·H
    one_per_rank   ep 4·D(EP)·T·(EP-1)/EP·s·H            etp 2·(P-1)·D(EP)·T·(s + w)·H
    hierarchical   between nodes 4·D(M)·T·(M-1)/M·s·H    inside 4·D(EP)·T·(N-1)/N·s·H    etp as one_per_rank

Sums over etp, and over ep of allgather, travel in the weights' type. Assignments and counts, `other` below, go along.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import comb

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import NodeAxes
from megatron_moe.moe.layer import build_dispatcher
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.parallel.communicator import Communicator, Pending
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.recording import Recording, Tally
from megatron_moe.parallel.state import Axis, ParallelState

E, K, H = 8, 3, 16
T = comb(E, K)  # one token for each set of experts
ROW, WEIGHT = 2, 4  # bytes of bfloat16 and float32
GRIDS = {"4 as 2 x 2": Grid(4, ep=4, ep_ranks_per_node=2), "etp": Grid(8, ep=4, etp=2, ep_ranks_per_node=2)}
AXES = ("ep", "etp", "ep_node", "ep_local")
KINDS = ("alltoall", "allgather", "one_per_rank", "hierarchical")

Bytes = dict[str, int]


class Booked(Communicator):
    """Another communicator, each of whose transfers is told to a Recording."""

    def __init__(self, axis: Axis, tally: Tally) -> None:
        self._inner = axis.comm
        self._book = Recording(axis.size, axis.rank, tally)

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        raise AssertionError("a dispatcher sums by reduce-scatter")

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        self._book.all_gather(tensor, rows)
        return self._inner.all_gather(tensor, rows)

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        self._book.reduce_scatter(tensor, rows)
        return self._inner.reduce_scatter(tensor, rows)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        self._book.all_to_all(tensor, send, receive)
        return self._inner.all_to_all(tensor, send, receive)

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        raise AssertionError("a dispatcher broadcasts nothing")

    def send(self, tensor: Tensor, to: int) -> Pending:
        raise AssertionError("a dispatcher sends to all ranks at once")

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        raise AssertionError("a dispatcher receives from all ranks at once")

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        raise AssertionError("a dispatcher sends to all ranks at once")

    def barrier(self) -> None:
        raise AssertionError("a dispatcher needs no barrier")


def booked(axis: Axis, tally: Tally) -> Axis:
    return replace(axis, comm=Booked(axis, tally))


def sent_on_rank(rank: int, world_size: int, grid: Grid) -> dict[str, Bytes]:
    """For each dispatcher, what leaves this rank along each axis in a forward and a backward pass."""
    state = ParallelState.distributed(grid)
    sets = torch.tensor(list(combinations(range(E), K)))
    token_ids = torch.arange(T).repeat_interleave(K)
    found = {}
    for kind in KINDS:
        tallies = {name: Tally() for name in AXES}
        ep, etp, between, inside = (booked(state.axis(name), tally) for name, tally in tallies.items())
        dispatcher = build_dispatcher(kind, E, ep, etp, nodes=NodeAxes(between, inside))
        rows = torch.ones(T, H, dtype=torch.bfloat16, requires_grad=True)
        plan = RoutingPlan(T, E, token_ids, sets.flatten(), torch.ones(T * K, requires_grad=True))
        batch = dispatcher.dispatch(rows, plan)
        dispatcher.combine(batch.rows * 1, batch).sum().backward()
        found[kind] = {name: sum(tally.sent_bytes.values()) for name, tally in tallies.items()}
    return found


def places(size: int) -> float:
    """D: on how many of so many ranks K experts stand."""
    return size * (1 - comb(E - E // size, K) / comb(E, K))


def visits(size: int, stand_on: float) -> float:
    """Of an axis on which rows visit ranks: rows, experts and weights, two counts for each rank."""
    other = T * K * (8 + 2 * WEIGHT) * (size - 1) / size + 16 * (size - 1)
    return 4 * stand_on * T * (size - 1) / size * ROW * H + other


def over_etp(rows: float, others: int, row_bytes: float) -> float:
    """Gathered from the other parts: rows, each of so many bytes in all transfers, and `others` beside them."""
    return others * (rows * row_bytes * H + T * K * (16 + 2 * WEIGHT) + 16)


def formula(kind: str, grid: Grid) -> dict[str, float]:
    ep, others, nodes, per_node = grid.ep, grid.etp - 1, grid.ep_node, grid.ep_local
    none = dict.fromkeys(AXES, 0.0)
    both = 2 * (ROW + WEIGHT)
    if kind == "alltoall":
        counts = 8 * E
        rows = 4 * T * K * ROW * H
        return {**none, "ep": (rows + counts) * (ep - 1) / ep, "etp": others * (rows + counts)}
    if kind == "allgather":
        whole = grid.etp * (T * H * both + T * K * (16 + 2 * WEIGHT)) + 16
        return {**none, "ep": (ep - 1) * whole, "etp": over_etp(T, others, both)}
    etp = over_etp(places(ep) * T, others, both)
    if kind == "one_per_rank":
        return {**none, "ep": visits(ep, places(ep)), "etp": etp}
    return {
        **none,
        "ep_node": visits(nodes, places(nodes)),
        "ep_local": visits(per_node, places(ep)),
        "etp": etp,
    }


@pytest.fixture(scope="module", params=GRIDS)
def grid_and_sent(request: pytest.FixtureRequest) -> tuple[Grid, list[dict[str, Bytes]]]:
    grid = GRIDS[request.param]
    return grid, run_on_ranks(grid.world_size, sent_on_rank, grid)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_sends_the_bytes_of_the_formula(
    kind: str, grid_and_sent: tuple[Grid, list[dict[str, Bytes]]]
) -> None:
    grid, sent = grid_and_sent
    wanted = {axis: pytest.approx(number, abs=1e-6) for axis, number in formula(kind, grid).items()}
    for answer in sent:
        assert answer[kind] == wanted


def test_fewer_rows_cross_between_nodes_than_without_telling_them_apart(
    grid_and_sent: tuple[Grid, list[dict[str, Bytes]]],
) -> None:
    grid, sent = grid_and_sent
    nodes = grid.ep_node
    # one row for each assignment, and for each rank visited, that stands in another node
    flat, visiting = (4 * number * T * (nodes - 1) / nodes * ROW * H for number in (K, places(grid.ep)))
    other = visits(nodes, 0.0)
    for answer in sent:
        rows = answer["hierarchical"]["ep_node"] - other
        assert flat / K <= rows < visiting < flat
