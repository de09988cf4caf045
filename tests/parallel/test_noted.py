"""A noted communicator does what the plain one does, and tells what it starts and waits for."""

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.parallel.communicator import Identity
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.noted import Noted, Notes, noted
from megatron_moe.parallel.state import ParallelState


class Diary(Notes):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def starts(self, axis: str, kind: str) -> None:
        self.lines.append(f"{kind} on {axis}")

    def waits(self) -> None:
        self.lines.append("waits")

    def arrived(self, seconds: float) -> None:
        assert seconds >= 0
        self.lines.append("arrived")


def use_all(rank: int, world_size: int) -> list[object]:
    diary = Diary()
    comm = noted(ParallelState.distributed(Grid(world_size)), diary).world.comm
    mine, other = torch.full((2,), float(rank + 1)), 1 - rank
    answers = [
        comm.all_reduce_(mine.clone()),
        comm.all_gather(mine, [2, 2]),
        comm.start_all_gather_(torch.zeros(4), mine).wait(),
        comm.reduce_scatter(torch.arange(4.0), [2, 2]),
        comm.all_to_all(mine, [1, 1], [1, 1]),
        comm.broadcast_(mine.clone(), 1),
    ]
    received = torch.zeros(2)
    pending = [comm.send(mine, other), comm.receive_(received, other)] if rank else []
    pending = pending or [comm.receive_(received, other), comm.send(mine, other)]
    for each in pending:
        each.wait()
    exchanged = torch.zeros(2)
    comm.send_receive_(mine, other, exchanged, other).wait()
    comm.barrier()
    return [[answer.tolist() for answer in [*answers, received, exchanged]], diary.lines]


def test_every_collective_gives_the_plain_answer_and_is_noted() -> None:
    found = run_on_ranks(2, use_all)
    for rank, (answers, lines) in enumerate(found):
        own = [[0.0, 2.0], [4.0, 6.0]][rank]
        theirs = [2.0 - rank] * 2
        gathered = [1.0, 1.0, 2.0, 2.0]
        assert answers == [[3.0, 3.0], gathered, gathered, own, [1.0, 2.0], [2.0, 2.0], theirs, theirs]
        one = ("all_reduce", "all_gather", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
        assert lines[:18] == [line for kind in one for line in (f"{kind} on world", "waits", "arrived")]
        assert sorted(lines[18:20]) == ["receive on world", "send on world"]
        after = ["send_receive on world", "waits", "arrived", "barrier on world", "waits", "arrived"]
        assert lines[20:] == ["waits", "arrived"] * 2 + after


def test_what_failed_has_not_arrived() -> None:
    class Failing(Identity):
        def barrier(self) -> None:
            raise RuntimeError("gone")

    diary = Diary()
    with pytest.raises(RuntimeError, match="gone"):
        Noted(Failing(), "dp", diary).barrier()
    assert diary.lines == ["barrier on dp", "waits"]


def test_plain_axes_stay_as_they_are() -> None:
    state = ParallelState.alone()
    assert noted(state, Diary()) == state
