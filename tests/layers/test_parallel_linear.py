"""Products split over tensor-parallel ranks: the numbers of one product, and collectives that travel beside them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from delayed import late
from ranks import run_on_ranks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_moe.layers.parallel_linear import TensorSplit, column_linear, row_linear
from megatron_moe.layers.recompute import remade
from megatron_moe.layers.weight_gradients import Deferred, Immediate, WeightGradients
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.in_pieces import places
from megatron_moe.parallel.state import Axis, ParallelState
from tests.layers.contexts import wide_sum

B, H, BRANCHES, F = 3, 5, 2, 8
TOTALS = (8, 7, 1)  # rows: even; uneven; empty on all ranks but one
SINKS: dict[str, Callable[[], WeightGradients | None]] = {
    "none": lambda: None,
    "immediate": Immediate,
    "deferred": Deferred,
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def axis_of(world_size: int) -> Axis:
    return ParallelState.distributed(Grid(world_size, tp=world_size)).tp


def gradient_of(weight: Tensor, sink: WeightGradients | None) -> Tensor:
    if isinstance(sink, Deferred):
        assert not wide_sum(weight).any()
        sink.run()
    if sink is not None:
        assert weight.grad is None
        return wide_sum(weight)
    assert weight.grad is not None
    return weight.grad


def leaf(tensor: Tensor) -> Tensor:
    found = tensor.clone().requires_grad_()
    found.main_grad = torch.zeros_like(tensor)  # type: ignore[attr-defined]
    return found


def by_columns(split: TensorSplit, sink: WeightGradients | None) -> None:
    """Each rank has other columns of the answer, and of its gradient."""
    size, rank = split.tp.size, split.tp.rank
    hidden, weight = random(split.rows, B, H, seed=1).requires_grad_(), random(BRANCHES, F, H, seed=2).requires_grad_()
    probe = random(split.rows, B, BRANCHES, F, seed=3)
    whole = (hidden @ weight.flatten(0, 1).t()).view(probe.shape)
    whole.backward(probe)
    columns = slice(rank * F // size, (rank + 1) * F // size)
    rows = places(split.shares)[rank] if split.sequence_parallel else slice(None)
    own, local = leaf(hidden.detach()[rows]), leaf(weight.detach()[:, columns])
    found = column_linear(own, local, BRANCHES * F // size, split, sink)
    torch.testing.assert_close(found, whole[..., columns].flatten(2))
    found.backward(probe[..., columns].flatten(2))
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(own.grad, hidden.grad[rows])
    torch.testing.assert_close(gradient_of(local, sink), weight.grad[:, columns])


def by_rows(split: TensorSplit, sink: WeightGradients | None) -> None:
    """Each rank has other columns of what is multiplied, and a part of the sum."""
    size, rank = split.tp.size, split.tp.rank
    inner, weight = random(split.rows, B, F, seed=1).requires_grad_(), random(H, F, seed=2).requires_grad_()
    probe = random(split.rows, B, H, seed=3)
    whole = inner @ weight.t()
    whole.backward(probe)
    columns = slice(rank * F // size, (rank + 1) * F // size)
    rows = places(split.shares)[rank] if split.sequence_parallel else slice(None)
    own, local = leaf(inner.detach()[..., columns]), leaf(weight.detach()[:, columns])
    found = row_linear(own, local, H, split, sink)
    torch.testing.assert_close(found, whole[rows])
    found.backward(probe[rows])
    assert inner.grad is not None and weight.grad is not None
    torch.testing.assert_close(own.grad, inner.grad[..., columns])
    torch.testing.assert_close(gradient_of(local, sink), weight.grad[:, columns])


def check_numbers(rank: int, world_size: int, sequence_parallel: bool) -> None:
    tp = axis_of(world_size)
    for overlap in (True, False):
        for rows in TOTALS:
            split = TensorSplit(tp, rows, sequence_parallel, overlap)
            for make_sink in SINKS.values():
                by_columns(split, make_sink())
                by_rows(split, make_sink())


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_outputs_and_gradients_are_those_of_one_product(world_size: int, sequence_parallel: bool) -> None:
    run_on_ranks(world_size, check_numbers, sequence_parallel)


def check_frozen(rank: int, world_size: int) -> None:
    for sequence_parallel in (True, False):
        split = TensorSplit(axis_of(world_size), 4, sequence_parallel, overlap=True)
        hidden = leaf(random(2 if sequence_parallel else 4, B, H, seed=1))
        weight, sink = random(F, H, seed=2), Immediate()
        inner = column_linear(hidden, weight, F, split, sink)
        row_linear(inner, weight.t().contiguous(), H, split, sink).sum().backward()
        assert hidden.grad is not None and hidden.grad.any()
        learning = leaf(weight)
        column_linear(hidden.detach(), learning, F, split, sink).sum().backward()
        assert wide_sum(learning).any()


def test_only_what_learns_gets_a_gradient() -> None:
    run_on_ranks(2, check_frozen)


def kept(split: TensorSplit, hidden: Tensor, weight: Tensor) -> list[int]:
    """Rows of each tensor that a product by columns keeps for the backward pass."""
    found: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        column_linear(hidden, weight, F, split, None)
    return found


def check_kept(rank: int, world_size: int) -> None:
    split = TensorSplit(axis_of(world_size), 7, sequence_parallel=True, overlap=True)
    hidden, weight = leaf(random(split.shares[rank], B, H, seed=1)), leaf(random(F, H, seed=2))
    assert kept(split, hidden, weight) == [split.shares[rank], F]
    assert kept(replace(split, overlap=False), hidden, weight) == [7, F]


def test_with_overlap_a_rank_keeps_its_own_rows_only() -> None:
    run_on_ranks(2, check_kept)


def check_made_again(rank: int, world_size: int) -> None:
    split = TensorSplit(axis_of(world_size), 7, sequence_parallel=True, overlap=True)
    source, weight = random(split.shares[rank], B, H, seed=rank), random(F, H, seed=2)
    gradients, calls = [], []
    for overlap in (True, False):
        made: list[Tensor] = []
        own, learning = leaf(source), leaf(weight)
        between = own.exp()

        def make(own: Tensor = own, made: list[Tensor] = made) -> Tensor:
            made.append(own.exp())
            return made[-1]

        with remade(between, make):
            out = column_linear(between, learning, F, replace(split, overlap=overlap), None)
        out.square().sum().backward()
        gradients.append((own.grad, learning.grad))
        calls.append(len(made))
    torch.testing.assert_close(*gradients)
    # without overlap it is the gathered input that is kept, and a norm before it is made again for nothing
    assert calls == [1, 0]


def test_with_overlap_what_stands_before_a_product_can_be_made_again() -> None:
    run_on_ranks(2, check_made_again)


def cost(overlap: bool, sequence_parallel: bool) -> tuple[int, int]:
    """Bytes that one of four ranks sends, and its multiplications, for a product by columns and one by rows, with
    their gradients."""
    state, tallies = ParallelState.recorded(Grid(4, tp=4), 1)
    split = TensorSplit(state.tp, 8, sequence_parallel, overlap)
    hidden = torch.empty(2 if sequence_parallel else 8, B, H, device="meta", requires_grad=True)
    weight = torch.empty(F, H, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        inner = column_linear(hidden, weight, F, split, None)
        row_linear(inner, weight.t(), H, split, None).sum().backward()
    return sum(tallies["tp"].sent_bytes.values()), counter.get_total_flops()


def test_overlap_sends_nothing_more_than_the_input_again_and_multiplies_nothing_twice() -> None:
    sent, multiplied = cost(False, True)
    assert cost(True, True) == (sent + 3 * 2 * B * H * 4, multiplied)
    assert cost(True, False) == cost(False, False)


DELAY_S = 0.01
ROWS, WIDTH, INNER = 1024, 256, 4096  # half a product takes 30 ms on a slow core: what a piece must hide is 10 ms


def share_that_shows(rank: int, world_size: int, sequence_parallel: bool, overlap: bool) -> float:
    """Of all delays in one forward and backward pass of a feed-forward layer: how much time is lost to them."""
    axis, comm = late(axis_of(world_size), DELAY_S)
    split = TensorSplit(axis, ROWS, sequence_parallel, overlap)
    hidden = leaf(torch.ones(split.shares[rank] if sequence_parallel else ROWS, 1, WIDTH, dtype=torch.float64))
    w1, w2 = (leaf(torch.ones(size, dtype=torch.float64)) for size in ((INNER, WIDTH), (WIDTH, INNER)))
    sink = Immediate()
    out = row_linear(column_linear(hidden, w1, INNER, split, sink), w2, WIDTH, split, sink)
    out.backward(torch.ones_like(out))
    return comm.slept / (comm.delayed * DELAY_S)


# without sequence parallelism the last of the pieces of a sum by rows travels beside nothing
@pytest.mark.parametrize(("sequence_parallel", "most"), [(True, 0.1), (False, 0.2)])
def test_a_slow_network_is_hidden_behind_the_products(sequence_parallel: bool, most: float) -> None:
    assert max(run_on_ranks(2, share_that_shows, sequence_parallel, True)) < most
    assert min(run_on_ranks(2, share_that_shows, sequence_parallel, False)) > 0.8
