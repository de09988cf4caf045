"""Ring attention against the softmax of whole sequences; what it does not compute, send or keep."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.layers import ring_attention
from megatron_moe.layers.attention_core import Sight
from megatron_moe.layers.ring_attention import RingAttention, Tiling
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from tests.layers.sequence_cases import (
    CASES,
    GROUPS,
    PER_GROUP,
    WIDTH,
    B,
    Case,
    S,
    answer_of_rank,
    draw,
    slow_answer,
    view_of,
    worst_errors,
)

# sums of a few dozen products in another order
ROUNDING = 1e-13
ALONE = ParallelState.alone()
CAUSAL = Case()


def recorded(rank: int, size: int) -> tuple[ParallelState, Any]:
    state, tallies = ParallelState.recorded(Grid(size, cp=size), rank)
    return state, tallies["cp"]


def sight_of(case: Case, state: ParallelState) -> Sight:
    view = view_of(S, case, state)
    return Sight(view, view, case.causal)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_find_what_the_whole_softmax_finds(world_size: int) -> None:
    for found in run_on_ranks(world_size, worst_errors, RingAttention):
        assert set(found) == set(CASES)
        assert all(error < ROUNDING for error in found.values()), found


def test_large_tiles_are_computed_a_few_keys_at_a_time() -> None:
    for found in run_on_ranks(2, worst_errors, partial(RingAttention, most_scores=3 * S * B, fewest_keys=1)):
        assert all(error < ROUNDING for error in found.values()), found
    tilings: list[Tiling] = []
    core = RingAttention(ALONE.cp, most_scores=20 * S, fewest_keys=2)
    for most, wanted in ((20 * S, 5), (1, 2)):
        core.most_scores = most
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring_attention._Ring, "apply", lambda *arguments: tilings.append(arguments[-1]))
            core(*draw(CAUSAL).leaves(), sight=sight_of(CAUSAL, ALONE))
        assert tilings.pop().keys_at_once == wanted  # of 2 samples, 4 heads and S / 2 queries


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("keys_at_once", [3, S])
def test_tiles_are_all_that_can_be_seen_and_no_more(size: int, causal: bool, prefix: bool, keys_at_once: int) -> None:
    case = Case(causal=causal, prefix=prefix)
    seen = torch.zeros(S, S, dtype=torch.int64)
    for rank in range(size):
        state = recorded(rank, size)[0]
        sight = sight_of(case, state)
        for sender in range(size):
            for tile in Tiling(sight, state.cp, keys_at_once).tiles(sender):
                rows, columns = sight.queries.rows[tile.rows], torch.arange(S)[tile.columns]
                allowed = sight.allowed(rows, columns)
                assert allowed.any() or prefix
                assert tile.masked or allowed.all()
                seen[rows[:, None], columns] += 1
    # every pair is in one tile or in none, and every pair that may look is in one
    assert seen.max() == 1
    everything = torch.arange(S)
    assert (seen.bool() | ~sight.allowed(everything, everything)[:, 0].any(dim=0)).all()
    if causal and not prefix:
        below = torch.ones(2 * size, 2 * size, dtype=torch.int64).tril()
        chunk = S // (2 * size)
        assert torch.equal(seen, below.repeat_interleave(chunk, 0).repeat_interleave(chunk, 1))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("causal", "tiles"), [(True, lambda size: 2 * size + 1), (False, lambda size: 4 * size)])
def test_every_rank_computes_as_many_tiles_forwards_and_backwards(
    size: int, causal: bool, tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, ...]] = []

    def counted(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
        computed.append((*left.shape[:2], right.shape[2]))
        return torch.bmm(left, right)

    monkeypatch.setattr(ring_attention, "wide_product", counted)
    chunk = S // (2 * size)
    for rank in range(size):
        computed.clear()
        state = recorded(rank, size)[0]
        answer_of_rank(RingAttention(state.cp), Case(causal=causal), draw(CAUSAL), state)
        # once each way: scores are not kept
        assert computed == [(B * GROUPS, PER_GROUP * chunk, chunk)] * (2 * tiles(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_sends_its_keys_and_values_to_all_but_one(size: int, dtype: torch.dtype) -> None:
    state, tally = recorded(1, size)
    answer_of_rank(RingAttention(state.cp), CAUSAL, draw(CAUSAL, dtype), state)
    elements = 2 * S * B * GROUPS * WIDTH  # of keys and values of the whole sequence
    hops = elements // size * (size - 1)
    # forwards, backwards, and their gradients in float32
    assert tally.sent_bytes == {"send_receive": 2 * hops * dtype.itemsize + hops * 4}
    assert tally.calls == {"send_receive": 3 * (size - 1)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_narrow_types_lose_what_their_rounding_loses(dtype: torch.dtype, tolerance: float) -> None:
    case = CASES["a bias for each sample, a prefix, packed and padded"]
    narrow = draw(case, dtype)
    exact = replace(narrow, **{name: getattr(narrow, name).double() for name in ("query", "key", "value", "bias")})
    wanted = slow_answer(case, exact)
    found = answer_of_rank(RingAttention(ALONE.cp), case, narrow, ALONE)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype is dtype
        assert float((mine.double() - theirs).abs().max()) < tolerance * float(theirs.abs().max())


def test_it_keeps_queries_own_keys_and_values_the_answer_and_one_number_each() -> None:
    state = recorded(0, 2)[0]
    sight, whole = sight_of(CAUSAL, state), draw(CAUSAL)
    query, key, value = (tensor[sight.queries.rows].requires_grad_() for tensor in whole.leaves())
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        RingAttention(state.cp)(query, key, value, sight)
    assert sorted(kept) == sorted([query.numel(), 2 * key.numel(), query.numel(), query.numel() // WIDTH])


def test_decoding_is_none_of_its_business() -> None:
    query, key, value = draw(CAUSAL).leaves()
    with pytest.raises(ValueError, match="decoded without context parallelism"):
        RingAttention(ALONE.cp)(query, key, value, replace(sight_of(CAUSAL, ALONE), cached=True))
