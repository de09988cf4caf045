"""Ranks that call different collectives are told so, all of them, with the culprit's name; and nothing else changes."""

import random
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.config.errors import PeerError
from megatron_moe.parallel.fingerprints import TEXT_BYTES, Call, disagreement
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from tests.parallel.desyncs import Desync, play

PATIENT = timedelta(seconds=300)


def caught(work: Callable[[], Any]) -> str:
    try:
        work()
    except PeerError as error:
        return str(error)
    return ""


def desync(rank: int, world_size: int, seed: str, numbers: list[int]) -> list[str]:
    """What this rank was told in each trial."""
    axis = ParallelState.distributed(Grid(world_size, tp=world_size), checks=PATIENT).tp
    told = []
    for number in numbers:
        case = Desync.draw(number, random.Random(f"{seed} {number}"), world_size)
        told.append(caught(lambda case=case: case.play(axis)))  # type: ignore[misc]
    return told


def judge(case: Desync, first: int, told: list[str]) -> str:
    """What is wrong with what the ranks were told; "" when all were told who is out of step, and where.

    first: the number of the first call that does not fit, over all trials.
    """
    everyone = list(range(len(told)))
    named = [case.culprit] if len(told) > 2 else everyone
    if len(set(told)) > 1:
        return "not all were told the same"
    if not told[0].startswith(f"collective {first} on axis tp: ranks {named} are out of step"):
        return "the culprit was not named, or not at once"
    calls = re.findall(r"^rank (\d): tp: .* at desyncs\.py:\d+", told[0], re.MULTILINE)
    return "" if calls == [str(rank) for rank in everyone] else "not all calls and their places were told"


@pytest.mark.timeout(1800)  # by night
@pytest.mark.goal(
    "R20",
    ci=204,
    nightly=4008,
    what="one rank swaps, leaves out, adds or changes a collective (2 to 4 ranks): all ranks are told who, what and "
    "where, before anything begins that does not fit",
)
def test_a_rank_that_calls_another_collective_is_named_to_all(trials: Trials) -> None:
    sizes = (2, 3, 4)
    failed: list[str] = []
    for place, world_size in enumerate(sizes):
        numbers = [n for n in range(trials.first, trials.first + trials.wanted) if n // 6 % len(sizes) == place]
        seed = f"{trials.seed} {world_size}"
        answers = run_on_ranks(world_size, desync, seed, numbers)
        first = 0
        for number, *told in zip(numbers, *answers, strict=True):
            case = Desync.draw(number, random.Random(f"{seed} {number}"), world_size)
            first += case.first_wrong
            wrong = judge(case, first, told)
            failed += [f"trial {number}: {wrong}: {case}: {told}"] if wrong else []
        trials.add(len(numbers))
    assert not failed, failed[:3]


def in_step(rank: int, world_size: int) -> list[str]:
    """What ranks that do the same are told, over programs of all kinds of calls."""
    axis = ParallelState.distributed(Grid(world_size, tp=world_size), checks=PATIENT).tp
    rng = random.Random(3)
    return [caught(lambda: play(Desync.draw(1, rng, world_size).right, axis)) for _ in range(60)]


def test_ranks_that_do_the_same_are_told_nothing() -> None:
    assert run_on_ranks(3, in_step) == [[""] * 60] * 3


TIMEOUT_S = 6.0


def absent(rank: int, world_size: int, culprits: dict[int, str]) -> str:
    """Three ranks of each tp axis call three times; a culprit comes only once, or goes to another axis alone."""
    state = ParallelState.distributed(Grid(world_size, tp=3), checks=timedelta(seconds=TIMEOUT_S))
    state.world.comm.barrier()

    def calls() -> None:
        for number in range(3):
            if number and culprits.get(rank) == "stays away":
                return
            axis = state.dp if number and rank in culprits else state.tp
            axis.comm.all_reduce_(torch.ones(2))

    return caught(calls)


@pytest.mark.goal(
    "R20", ci=4, nightly=4, what="one rank of three never comes, or waits elsewhere: the others name it and its place"
)
def test_a_rank_that_never_comes_is_named_after_the_timeout(trials: Trials) -> None:
    culprits = {1: "stays away", 3: "goes elsewhere", 8: "stays away", 10: "goes elsewhere"}
    told = run_on_ranks(12, absent, culprits)
    for culprit, what in culprits.items():
        group = range(culprit // 3 * 3, culprit // 3 * 3 + 3)
        for rank in group:
            if rank != culprit:
                assert told[rank].startswith("collective 2 on tp (tp: all_reduce sum of float32 (2) at test_checked.py")
                assert f"ranks [{culprit}] did not come within 6 s, or died" in told[rank]
                seen = "dp" if what == "goes elsewhere" else "tp"
                assert f"rank {culprit} was last seen at {seen}: all_reduce sum" in told[rank]
        if what == "stays away":
            assert told[culprit] == ""
        else:
            others = [rank for rank in range(12) if rank % 3 == culprit % 3 and rank != culprit]
            assert f"ranks {others} did not come" in told[culprit]
        trials.add(1)


Message = tuple[tuple[int, ...], torch.dtype]
SENT: Message = ((2, 3), torch.float32)
EXPECTED: dict[str, Message] = {
    "as it is": SENT,
    "shorter": ((1, 3), torch.float32),
    "longer": ((4, 3), torch.float32),
    "another type": ((2, 3), torch.int32),
}


def message(rank: int, world_size: int, expected: Message) -> tuple[str, float, float]:
    """Rank 0 sends to rank 1 two messages, of which the second may not be what rank 1 expects."""
    axis = ParallelState.distributed(Grid(world_size, pp=world_size), checks=PATIENT).pp
    received = [torch.zeros(*shape, dtype=dtype) for shape, dtype in (SENT, expected)]

    def both() -> None:
        sent = [torch.full(SENT[0], number, dtype=SENT[1]) for number in (5.0, 7.0)]
        if rank == 0:
            pending = [axis.comm.send(tensor, 1) for tensor in sent]
        else:
            pending = [axis.comm.receive_(tensor, 0) for tensor in received]
        for each in pending:
            each.wait()

    told = caught(both)
    return told, float(received[0].sum()), float(received[1].sum())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_message_is_compared_at_both_ends(name: str) -> None:
    sender, receiver = run_on_ranks(2, message, EXPECTED[name])
    assert sender[0] == receiver[0]
    if name == "as it is":
        assert receiver == ("", 30.0, 42.0)
        return
    assert receiver[1:] == (30.0, 0.0), "nothing was received that is not expected"
    shape = ", ".join(map(str, EXPECTED[name][0]))
    dtype = str(EXPECTED[name][1]).removeprefix("torch.")
    assert "message 2 on pp from rank 0 to rank 1: the two ranks are out of step" in sender[0]
    assert "sent: pp: message of float32 (2, 3) at test_checked.py:" in sender[0]
    assert f"expected: pp: message of {dtype} ({shape}) at test_checked.py:" in sender[0]


def alone_with_it(rank: int, world_size: int) -> str:
    """Rank 2 waits for rank 0, which sends nothing; rank 1 sends to rank 3, which wants nothing."""
    axis = ParallelState.distributed(Grid(world_size, pp=2), checks=timedelta(seconds=TIMEOUT_S)).pp
    tensor = torch.zeros(2)
    work = {1: lambda: axis.comm.send(tensor, 1).wait(), 2: lambda: axis.comm.receive_(tensor, 0).wait()}
    return caught(work.get(rank, lambda: None))


def test_a_message_of_which_only_one_end_comes_is_told_there() -> None:
    idle, sender, receiver, idle_too = run_on_ranks(4, alone_with_it)
    assert idle == idle_too == ""
    assert "pp from rank 0 to rank 2, sent (pp: message of float32 (2) at test_checked.py:" in receiver
    assert "ranks [0] did not come within 6 s" in receiver and "rank 0 was last seen at nowhere yet" in receiver
    assert "pp from rank 1 to rank 3, received (pp: message of float32 (2) at test_checked.py:" in sender
    assert "ranks [3] did not come within 6 s" in sender


def of(what: str, site: str = "a.py:1", axis: str = "tp", **more: Any) -> Call:
    return Call(axis, what, site, **more)


A, B = of("barrier"), of("all_reduce", "b.py:2")


@pytest.mark.parametrize(
    ("calls", "named"),
    [
        ([A, A, A], None),
        ([A, B, A], [11]),
        ([B, A, A, A], [10]),
        ([A, B], [10, 11]),
        ([A, B, A, B], [10, 11, 12, 13]),
        # the same call from another line is another call
        ([A, A, of("barrier", "a.py:9")], [12]),
        ([A, A, of("barrier", axis="world")], [12]),
        ([A, of("barrier", problem="3 rows given, but 2 announced"), B], [11]),
        ([of("gather", rows=(1, 2, 3)), of("gather", rows=(1, 2, 4)), of("gather", rows=(1, 2, 3))], [11]),
        # the first sends one row to the second, which expects two: nobody knows who is right
        (
            [
                of("exchange", gives=(0, 1, 2), takes=(0, 3, 4)),
                of("exchange", gives=(3, 0, 5), takes=(2, 0, 6)),
                of("exchange", gives=(4, 6, 0), takes=(2, 5, 0)),
            ],
            [10, 11],
        ),
        # the second expects too much of both
        (
            [
                of("exchange", gives=(0, 1, 2), takes=(0, 3, 4)),
                of("exchange", gives=(3, 0, 5), takes=(2, 0, 7)),
                of("exchange", gives=(4, 6, 0), takes=(2, 5, 0)),
            ],
            [11],
        ),
    ],
)
def test_the_minority_is_out_of_step(calls: list[Call], named: list[int] | None) -> None:
    told = disagreement(calls, range(10, 10 + len(calls)))
    assert told.startswith(f"ranks {named} are out of step") if named else told == ""


def test_what_is_said_of_a_call_comes_over_as_it_is_and_never_too_long() -> None:
    call = of("all_to_all of int64 (*, 4)", gives=(1, 2, 3), takes=(4, 5, 6))
    said = call.encode(3)
    assert said.shape == (TEXT_BYTES + 72,) and Call.decode(said) == call
    long = of("x" * 5000, "y" * 5000, rows=(7,) * 64)
    found = Call.decode(long.encode(64))
    assert found.rows == long.rows and found.what == "x" * 300 and long.site.startswith(found.site) and found.site
