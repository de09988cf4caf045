"""Two pieces of work on two threads, one at a time, in an order that is the same every time."""

from collections.abc import Callable

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.recording import Recording, Tally
from megatron_moe.parallel.state import ParallelState
from megatron_moe.parallel.turns import Turns, Yielding, yielding

CPU = torch.device("cpu")


def piece(turns: Turns, said: list[str], name: str, parts: int) -> Callable[[], None]:
    def work() -> None:
        for part in range(parts):
            said.append(f"{name}{part}")
            turns.give_way()
        said.append(f"{name}.")

    return work


@pytest.mark.parametrize(
    ("first", "second", "order"),
    [
        (2, 2, "a0 b0 a1 b1 a. b."),
        (0, 2, "a. b0 b1 b."),
        (3, 1, "a0 b0 a1 b. a2 a."),
        (1, 0, "a0 b. a."),
    ],
)
def test_each_goes_on_until_it_waits_or_ends(first: int, second: int, order: str) -> None:
    for _ in range(20):
        turns, said = Turns(CPU), []
        turns.together(piece(turns, said, "a", first), piece(turns, said, "b", second))
        assert " ".join(said) == order


def test_alone_nobody_gives_way() -> None:
    turns, said = Turns(CPU), []
    piece(turns, said, "a", 2)()
    assert said == ["a0", "a1", "a."]


class Slow(Arrival):
    """Here after so many pieces of other work."""

    def __init__(self, pieces: list[str], number: int) -> None:
        self.pieces, self.number = pieces, number

    def wait(self) -> torch.Tensor:
        return torch.zeros(1)

    def is_here(self) -> bool:
        return len(self.pieces) >= self.number


class SlowRanks(Recording):
    """Answers come after so many pieces of work."""

    def __init__(self, pieces: list[str], number: int) -> None:
        super().__init__(2, 0, Tally())
        self.pieces, self.number = pieces, number

    def start_all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> Arrival:
        return Slow(self.pieces, len(self.pieces) + self.number)


@pytest.mark.parametrize(("available", "number", "done"), [(5, 2, 2), (1, 2, 1), (0, 2, 0), (5, 0, 0)])
def test_what_is_not_here_is_waited_for_with_other_work(available: int, number: int, done: int) -> None:
    turns, pieces, left = Turns(CPU), [], ["piece"] * available

    def filler() -> bool:
        pieces.extend(left[:1])
        return bool(left) and bool(left.pop())

    comm = Yielding(SlowRanks(pieces, number), turns)
    turns.alone(lambda: comm.all_reduce_(torch.zeros(1)) and None, filler=filler)
    assert len(pieces) == done
    pieces.clear()
    comm.all_reduce_(torch.zeros(1))  # outside there is no other work
    assert pieces == []


@pytest.mark.parametrize("who", ["first", "second"])
def test_a_failure_ends_both_and_is_told(who: str) -> None:
    turns, said = Turns(CPU), []

    def fails() -> None:
        turns.give_way()
        raise ValueError(f"the {who} failed")

    other = piece(turns, said, "x", 5)
    with pytest.raises(ValueError, match=f"the {who} failed"):
        turns.together(*((fails, other) if who == "first" else (other, fails)))
    assert said[-1] in ("x0", "x1")  # not to its end
    # and the next pair is not disturbed
    said.clear()
    turns.together(piece(turns, said, "a", 1), piece(turns, said, "b", 1))
    assert said == ["a0", "b0", "a.", "b."]


def test_gradients_are_computed_in_both() -> None:
    turns, grads = Turns(CPU), []

    def work() -> None:
        weight = torch.ones(3, requires_grad=True)
        loss = (weight * 2).sum()
        turns.give_way()
        loss.backward()
        grads.append(weight.grad)

    turns.together(work, work)
    assert all(grad is not None and torch.equal(grad, torch.full((3,), 2.0)) for grad in grads) and len(grads) == 2


def exchange_by_turns(rank: int, world_size: int) -> list[float]:
    """Each piece sends its own numbers; were they in another order on a rank, they would arrive at the wrong one."""
    turns = Turns(CPU)
    state = ParallelState.distributed(Grid(world_size, ep=world_size))
    axis = yielding(state.ep, turns)
    found: dict[str, list[float]] = {"a": [], "b": []}

    def piece_of(name: str, parts: int, start: float) -> Callable[[], None]:
        def work() -> None:
            for part in range(parts):
                mine = torch.full((world_size, 1), start + 10 * part + rank)
                ones = [1] * world_size
                found[name] += axis.comm.all_to_all(mine, ones, ones).flatten().tolist()
                found[name].append(float(axis.comm.all_reduce_(torch.tensor(start + rank))))
                found[name] += axis.comm.all_gather(torch.tensor([start + part + rank]), ones).tolist()
                found[name] += axis.comm.reduce_scatter(torch.full((world_size,), start + rank), ones).tolist()

        return work

    turns.together(piece_of("a", 3, 100.0), piece_of("b", 2, 1000.0))
    assert yielding(state.tp, turns) is state.tp  # nobody to wait for
    return found["a"] + found["b"]


def test_collectives_of_both_pieces_pair_up_on_all_ranks() -> None:
    ranks = 3

    def wanted(parts: int, start: float) -> list[float]:
        sum_of_all = ranks * start + sum(range(ranks))
        return [
            value
            for part in range(parts)
            for value in (
                *(start + 10 * part + rank for rank in range(ranks)),
                sum_of_all,
                *(start + part + rank for rank in range(ranks)),
                sum_of_all,
            )
        ]

    for found in run_on_ranks(ranks, exchange_by_turns):
        assert found == wanted(3, 100.0) + wanted(2, 1000.0)
