"""The ring of a pipeline: everybody hears his neighbour, and no two ranks send both ways on one channel."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_moe.parallel.communicator import Communicator, Done, Identity, Pending
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState, _channel
from megatron_moe.pipeline.transfer import Crossing, Transfer

Way = tuple[tuple[str, tuple[int, ...]], int, int]  # channel, from, to
EDGE = {"hidden": ((2,), torch.float32)}
CROSSING = Crossing(1, 0)


class Noting(Identity):
    """Writes down who would send to whom, and on which process group."""

    def __init__(self, channel: tuple[str, tuple[int, ...]], place: int, sent: list[Way], heard: list[Way]) -> None:
        self.channel, self.place, self.sent, self.heard = channel, place, sent, heard

    def send(self, tensor: Tensor, to: int) -> Pending:
        self.sent.append((self.channel, self.place, to))
        return Done()

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        self.heard.append((self.channel, source, self.place))
        return Done()


def maker(sent: list[Way], heard: list[Way]) -> Callable[[str, tuple[int, ...], int], Communicator]:
    return lambda name, ranks, place: Noting(_channel(name, ranks), place, sent, heard)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_no_two_ranks_send_both_ways_on_one_channel(ranks: int) -> None:
    """NCCL plays what passes between two ranks in order: sending both ways on one channel, each may wait forever."""
    sent: list[Way] = []
    heard: list[Way] = []
    for rank in range(ranks):
        state = ParallelState.build(Grid(ranks, pp=ranks, rounds=2), rank, maker(sent, heard))
        transfer = Transfer(state, torch.device("cpu"))
        transfer.send_forward({"hidden": torch.zeros(2)}, EDGE, CROSSING)
        transfer.receive_forward(EDGE, CROSSING)
        transfer.send_backward({"hidden": torch.zeros(2)}, EDGE, CROSSING)
        transfer.receive_backward(EDGE, CROSSING)
    assert sorted(sent) == sorted(heard) and len(set(sent)) == 2 * ranks
    assert not [way for way in sent if (way[0], way[2], way[1]) in sent]
    assert {(source, to) for _, source, to in sent} == {
        pair for rank in range(ranks) for pair in ((rank, (rank + 1) % ranks), ((rank + 1) % ranks, rank))
    }


@pytest.mark.parametrize(("ranks", "channels"), [(2, 4), (3, 2), (8, 2)])
def test_only_a_ring_of_two_needs_channels_of_its_own_for_the_way_round(ranks: int, channels: int) -> None:
    places = tuple(range(ranks))
    assert len({_channel(name, places) for name in ("pp", "pp_back", "pp_wrap", "pp_wrap_back")}) == channels


def test_a_pipeline_of_one_stage_a_rank_has_no_way_round() -> None:
    state, _ = ParallelState.recorded(Grid(4, pp=2), 1)
    assert state.pp_wrap.size == state.pp_wrap_back.size == 1
    state, _ = ParallelState.recorded(Grid(4, pp=2, rounds=2), 1)
    assert state.pp_wrap.ranks == state.pp_wrap_back.ranks == state.pp.ranks


class Leaving(Pending):
    """A tensor under way, until somebody says that it has left."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.left, self.waited = tensor, False, False

    def wait(self) -> None:
        self.waited = True

    def is_over(self) -> bool:
        return self.left


class Slow(Identity):
    """Keeps what it sends until it has left."""

    def __init__(self) -> None:
        self.sent: list[Leaving] = []

    def send(self, tensor: Tensor, to: int) -> Pending:
        self.sent.append(Leaving(tensor))
        return self.sent[-1]


def test_what_has_left_is_let_go_and_what_has_not_is_waited_for() -> None:
    slow = Slow()
    state = ParallelState.build(Grid(2, pp=2), 0, lambda name, ranks, place: slow)
    transfer = Transfer(state, torch.device("cpu"))
    for number in range(3):
        transfer.send_forward({"hidden": torch.zeros(2)}, EDGE, Crossing(1, number))
        slow.sent[number].left = number == 0
    first, second, third = map(weakref.ref, slow.sent)
    slow.sent.clear()
    assert first() is None
    for known in (second(), third()):
        assert known is not None and not known.waited
        slow.sent.append(known)
    transfer.finish()
    assert all(pending.waited for pending in slow.sent)
