"""Each collective against its definition, and its backward pass against <y, A x> = <Aᵀ y, x>."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.parallel import collectives
from megatron_moe.parallel.collectives import shares
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import Axis, ParallelState

CPU = torch.device("cpu")
WIDTH = 3
TOTALS = (8, 7, 1, 0)  # even; uneven; empty on all ranks but one; empty


@dataclass(frozen=True)
class Case:
    """An operator of a whole world: how its input and output lie on the ranks, and what it computes.

    "replicated" = one tensor, the same on all ranks; "partial" and "split" = another one on each rank.
    """

    before: str
    after: str
    apply: Callable[[Tensor, Axis, list[int]], Tensor]
    defined: Callable[[list[Tensor], int, list[int]], Tensor]  # all ranks' inputs, rank, rows -> output of that rank


def cut(whole: Tensor, rank: int, rows: list[int]) -> Tensor:
    return whole[sum(rows[:rank]) : sum(rows[: rank + 1])]


def total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


CASES = {
    "copy_to": Case(
        "replicated", "partial", lambda x, axis, rows: collectives.copy_to(x, axis), lambda xs, rank, rows: xs[rank]
    ),
    "reduce_from": Case(
        "partial",
        "replicated",
        lambda x, axis, rows: collectives.reduce_from(x, axis),
        lambda xs, rank, rows: total(xs),
    ),
    "split_to": Case(
        "replicated",
        "split",
        lambda x, axis, rows: collectives.split_to(x, axis),
        lambda xs, rank, rows: cut(xs[0], rank, rows),
    ),
    "gather_from": Case(
        "split",
        "replicated",
        lambda x, axis, rows: collectives.gather_from(x, axis, sum(rows)),
        lambda xs, rank, rows: torch.cat(xs),
    ),
    "gather_for_partial": Case(
        "split", "partial", collectives.gather_for_partial, lambda xs, rank, rows: torch.cat(xs)
    ),
    "reduce_scatter": Case(
        "partial", "split", collectives.reduce_scatter, lambda xs, rank, rows: cut(total(xs), rank, rows)
    ),
}


def tensors(kind: str, rows: list[int], seed: int) -> list[Tensor]:
    """What every rank holds, the same list on every rank."""
    random = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randn(count, WIDTH, dtype=torch.float64, generator=random)

    if kind == "split":
        return [draw(count) for count in rows]
    if kind == "partial":
        return [draw(sum(rows)) for _ in rows]
    return [draw(sum(rows))] * len(rows)


def inner(kind: str, left: list[Tensor], right: list[Tensor]) -> float:
    """The inner product of two values of the world; a replicated one is one value."""
    products = [float((a * b).sum()) for a, b in zip(left, right, strict=True)]
    return products[0] if kind == "replicated" else sum(products)


def gather_all(tensor: Tensor, world: Axis) -> list[Tensor]:
    rows = collectives.gather_counts(tensor.shape[0], world, CPU)
    return list(world.comm.all_gather(tensor.detach(), rows).split(rows))


def check_case(case: Case, world: Axis, rows: list[int]) -> None:
    inputs, probes = tensors(case.before, rows, 1), tensors(case.after, rows, 2)
    mine = inputs[world.rank].clone().requires_grad_()
    output = case.apply(mine, world, rows)
    torch.testing.assert_close(output, case.defined(inputs, world.rank, rows))
    assert torch.equal(mine, inputs[world.rank]), "the argument was changed"
    output.backward(probes[world.rank])
    assert mine.grad is not None
    forward = inner(case.after, probes, gather_all(output, world))
    backward = inner(case.before, gather_all(mine.grad, world), inputs)
    assert forward == pytest.approx(backward, rel=1e-12, abs=1e-12)
    if case.before == "replicated":  # then so is its gradient
        assert all(torch.equal(grad, mine.grad) for grad in gather_all(mine.grad, world))


def check_exchange(world: Axis, seed: int) -> None:
    size = world.size
    counts = torch.randint(0, 3, (size, size), generator=torch.Generator().manual_seed(seed))  # from row to column
    if seed == 0:
        counts.zero_()
    inputs = tensors("split", counts.sum(1).tolist(), seed + 10)
    send, receive = counts[world.rank].tolist(), counts[:, world.rank].tolist()
    mine = inputs[world.rank].clone().requires_grad_()
    output = collectives.exchange(mine, world, send, receive)
    parts = [inputs[source].split(counts[source].tolist())[world.rank] for source in range(size)]
    assert torch.equal(output, torch.cat(parts))
    probes = tensors("split", counts.sum(0).tolist(), seed + 20)
    output.backward(probes[world.rank])
    assert mine.grad is not None
    # every row is sent once: the way back brings each gradient to where its row came from
    back = [probes[to].split(counts[:, to].tolist())[world.rank] for to in range(size)]
    assert torch.equal(mine.grad, torch.cat(back))


def check_all(rank: int, world_size: int) -> None:
    world = ParallelState.distributed(Grid(world_size)).world
    for name, case in CASES.items():
        for count in TOTALS:
            try:
                check_case(case, world, shares(count, world_size))
            except Exception as error:
                raise AssertionError(f"{name} with {count} rows") from error
    uneven = [3, 0, 2, 1][:world_size]  # the rows of these two need not be even shares
    for name in ("gather_for_partial", "reduce_scatter"):
        check_case(CASES[name], world, uneven)
    for seed in range(3):
        check_exchange(world, seed)
    assert collectives.gather_counts(rank * rank, world, CPU) == [other * other for other in range(world_size)]
    kept = torch.full((2,), float(rank))
    assert collectives.sum_over(kept, world).tolist() == [sum(range(world_size))] * 2
    assert kept.tolist() == [rank] * 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_collective_and_its_adjoint(world_size: int) -> None:
    run_on_ranks(world_size, check_all)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_rank_keeps_what_it_has(case: Case) -> None:
    check_case(case, ParallelState.alone().world, [4])


def test_shares_differ_by_one_at_most_and_the_first_have_more() -> None:
    assert shares(7, 4) == [2, 2, 2, 1]
    assert shares(2, 4) == [1, 1, 0, 0]
    for count in range(20):
        for size in range(1, 7):
            found = shares(count, size)
            assert sum(found) == count and len(found) == size
            assert found == sorted(found, reverse=True) and found[0] - found[-1] <= 1
