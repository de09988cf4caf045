"""Buckets: who lies where, and what is summed over whom and when."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from optim.toy_model import (
    LAYOUTS,
    accumulate,
    build,
    initial_weights,
    local_part,
    make,
    make_buckets,
    named,
    whole_gradient,
)
from ranks import run_on_ranks
from torch import nn

from megatron_moe.optim.bucket import ALIGNMENT, Bucket, wide_dtype
from megatron_moe.optim.gradients import GradientBuckets
from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import ParallelState
from megatron_moe.parallel.wrapped import Wrapped

EXACT_SUM = 1e-14  # a few additions in float64


def parameter(*shape: int, dtype: torch.dtype = torch.float32, layout: ParamLayout | None = None) -> nn.Parameter:
    return make(
        {"weight": layout or ParamLayout(shape, init=Init(std=1.0))}, ParallelState.alone(), dtype
    ).get_parameter("weight")


def alone(*parameters: nn.Parameter, bucket_elements: int = 1000) -> GradientBuckets:
    members = [(f"layers.{number}.weight", one) for number, one in enumerate(parameters)]
    return GradientBuckets([members], ParallelState.alone(), bucket_elements=bucket_elements, sharded=True)


def test_parameters_keep_their_values_and_share_one_storage() -> None:
    first, second = parameter(5, 7), parameter(3)
    values = first.detach().clone(), second.detach().clone()
    bucket = alone(first, second).buckets[0]
    assert torch.equal(first, values[0]) and torch.equal(second, values[1])
    storage = bucket.weights.untyped_storage().data_ptr()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() == storage
    bucket.weights.fill_(2.0)
    assert (first == 2.0).all() and (second == 2.0).all()


def test_main_grad_is_a_view_of_the_bucket_shaped_like_the_parameter() -> None:
    weight = parameter(5, 7)
    buckets = alone(weight)
    weight.main_grad.add_(1.0)  # type: ignore[attr-defined]
    assert weight.main_grad.shape == (5, 7)  # type: ignore[attr-defined]
    assert buckets.buckets[0].gradients.sum() == 35.0
    buckets.zero_()
    assert not weight.main_grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_gradients_are_wide(dtype: torch.dtype, wide: torch.dtype) -> None:
    weight = parameter(4, dtype=dtype)
    alone(weight)
    assert wide_dtype(dtype) == wide
    assert weight.dtype == dtype
    assert weight.main_grad.dtype == wide  # type: ignore[attr-defined]


def test_a_bucket_takes_no_more_than_its_size_and_never_cuts_a_parameter() -> None:
    buckets = alone(*(parameter(60) for _ in range(4)), parameter(500), parameter(10), bucket_elements=130)
    assert [[segment.name for segment in bucket.segments] for bucket in buckets.buckets] == [
        ["layers.0.weight", "layers.1.weight"],
        ["layers.2.weight", "layers.3.weight"],
        ["layers.4.weight"],
        ["layers.5.weight"],
    ]


def test_only_what_is_reduced_alike_shares_a_bucket() -> None:
    shape = (4,)
    buckets = alone(
        parameter(4),
        parameter(4, layout=ParamLayout(shape, reduce_over="edp")),
        parameter(4, layout=ParamLayout(shape, sum_over=("tp",))),
        parameter(4, dtype=torch.bfloat16),
        parameter(4),
    )
    names = [[segment.name[7] for segment in bucket.segments] for bucket in buckets.buckets]
    assert names == [["0", "4"], ["1"], ["2"], ["3"]]


def test_parameters_and_shards_begin_on_aligned_places() -> None:
    state, _ = ParallelState.recorded(Grid(3), rank=1)
    members = [(f"layers.{size}.weight", parameter(size)) for size in (5, 33, 70)]
    bucket = GradientBuckets([members], state, bucket_elements=1000, sharded=True).buckets[0]
    assert [weight.storage_offset() % ALIGNMENT for _, weight in members] == [0, 0, 0]
    assert bucket.shard_elements % ALIGNMENT == 0
    assert bucket.weights.numel() == 3 * bucket.shard_elements
    # 16 + 48 + 80 elements with gaps, 48 on each rank: the middle one begins at element 32 of the second parameter
    assert [(segment.name, segment.start, segment.place) for segment in bucket.segments] == [
        ("layers.33.weight", 32, slice(0, 1)),
        ("layers.70.weight", 0, slice(16, 48)),
    ]


def test_frozen_parameters_are_left_alone() -> None:
    weight, frozen = parameter(4), parameter(4)
    frozen.requires_grad_(False)
    buckets = alone(weight, frozen)
    assert not hasattr(frozen, "main_grad")
    assert [segment.name for segment in buckets.buckets[0].segments] == ["layers.0.weight"]
    with pytest.raises(ValueError, match="no parameter to train"):
        alone(frozen)


def test_a_parameter_of_two_stages_stands_once_and_waits_for_both() -> None:
    state, tallies = ParallelState.recorded(Grid(2), rank=0)
    weight, own = parameter(4), parameter(4)
    stages = [[("tied", weight)], [("tied", weight), ("own", own)]]
    buckets = GradientBuckets(stages, state, bucket_elements=100, sharded=False)
    assert [[segment.name for segment in bucket.segments] for bucket in buckets.buckets] == [["tied"], ["own"]]
    buckets.zero_()
    for stage, calls in ((0, 0), (1, 1), (None, 2)):
        buckets.reduce(stage)
        assert tallies["dp_cp"].calls.get("all_reduce", 0) == calls


def test_a_stage_is_reduced_when_told_and_only_once() -> None:
    state, tallies = ParallelState.recorded(Grid(4, ep=2), rank=0)
    buckets = GradientBuckets(named(build(state, torch.float32)), state, bucket_elements=10**6, sharded=True)

    def calls(axis: str) -> int:
        return tallies[axis].calls.get("reduce_scatter", 0)

    buckets.reduce(stage=0)  # embedding; layer 0 with sum over tp; layer 0 without
    assert (calls("dp_cp"), calls("edp")) == (3, 0)
    buckets.reduce(stage=0)
    assert (calls("dp_cp"), calls("edp")) == (3, 0)
    buckets.reduce(stage=1)  # router; final norm; the experts apart
    assert (calls("dp_cp"), calls("edp")) == (5, 1)
    buckets.reduce()
    assert (calls("dp_cp"), calls("edp")) == (5, 1)
    buckets.zero_()
    buckets.reduce()
    assert (calls("dp_cp"), calls("edp")) == (10, 2)


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_tied_across_stages_waits_for_the_last_call(rank: int) -> None:
    state, tallies = ParallelState.recorded(Grid(4, pp=2), rank)
    buckets = GradientBuckets(named(build(state, torch.float32)), state, bucket_elements=10**6, sharded=True)
    buckets.reduce(stage=0)
    assert "all_reduce" not in tallies["embedding"].calls
    buckets.reduce()
    assert tallies["embedding"].calls == {"all_reduce": 1}
    # the shard alone: half of 40 x 12 float32
    assert tallies["embedding"].sent_bytes == {"all_reduce": 40 * 12 // 2 * 4}


def test_what_waits_for_other_stages_is_summed_in_one_order_whichever_stages_a_rank_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two collectives over different ranks, in another order on each, would wait for each other."""
    order: list[str] = []
    monkeypatch.setattr(Bucket, "reduce", lambda bucket: order.append(bucket.name))
    layouts = {"relative_bias.weight": ("pp",), "embedding.weight": ("embedding",), "layers.0.weight": ()}
    for names in (list(layouts), list(reversed(layouts))):
        state, _ = ParallelState.recorded(Grid(2, pp=2, rounds=2), rank=0)
        made = {name: parameter(4, layout=ParamLayout((4,), sum_over=layouts[name])) for name in names}
        stages = [[(name, one)] for name, one in made.items()]
        GradientBuckets(stages, state, bucket_elements=100, sharded=False).reduce()
    assert order == ["layers.0.weight", "embedding.weight", "relative_bias.weight"] * 2


LAYOUTS_OF_FOUR: list[dict[str, int]] = [
    {},
    {"tp": 2},
    {"cp": 2},
    {"ep": 2},
    {"ep": 2, "etp": 2},
    {"pp": 2},
    {"tp": 2, "pp": 2},
]


def own_parts_are_whole_sums(rank: int, world_size: int) -> float:
    """Largest error of any owned gradient, over layouts, sharded or not."""
    worst = 0.0
    for sizes in LAYOUTS_OF_FOUR:
        state = ParallelState.distributed(Grid(world_size, **sizes))
        for sharded in (True, False):
            stages = build(state, torch.float64)
            buckets = make_buckets(stages, state, sharded)
            accumulate(stages, state, step=0)
            buckets.reduce()
            for bucket in buckets.buckets:
                for segment in bucket.segments:
                    whole = local_part(whole_gradient(segment.name, 0), LAYOUTS[segment.name], state).reshape(-1)
                    got = segment.of(bucket.own_gradients).numpy()
                    want = whole[segment.start : segment.start + got.size]
                    worst = max(worst, float(np.abs(got - want).max()))
    return worst


def test_each_owner_gets_the_sum_over_all_ranks_that_hold_a_part() -> None:
    assert max(run_on_ranks(4, own_parts_are_whole_sums)) < EXACT_SUM


def shards_cover_every_element_once(rank: int, world_size: int) -> int:
    state = ParallelState.distributed(Grid(world_size))
    buckets = make_buckets(build(state, torch.float32), state, sharded=True)
    return sum(segment.of(bucket.own_weights).numel() for bucket in buckets.buckets for segment in bucket.segments)


def test_shards_cover_every_element_once() -> None:
    total = sum(whole.size for whole in initial_weights(torch.float32).values())
    owned = run_on_ranks(4, shards_cover_every_element_once)
    assert sum(owned) == total
    # spread, not piled up on one rank
    assert max(owned) < 1.1 * total / 4


def test_the_planner_can_ask_on_meta_what_a_thousand_ranks_would_send() -> None:
    state, tallies = ParallelState.recorded(Grid(1024, ep=8), rank=5)
    weight = new_parameter(ParamLayout((1024, 1024)), dtype=torch.bfloat16)
    bucket = GradientBuckets([[("weight", weight)]], state, bucket_elements=1, sharded=True).buckets[0]
    bucket.reduce()
    bucket.gather_weights()
    # all but the own 1024th part: float32 gradients out, bfloat16 weights in
    assert tallies["dp_cp"].sent_bytes == {"reduce_scatter": 1023 * 1024 * 4, "all_gather": 1023 * 1024 * 2}


class Waited(Arrival):
    def __init__(self, inner: Arrival, waits: list[int]) -> None:
        self.inner, self.waits = inner, waits

    def wait(self) -> torch.Tensor:
        found = self.inner.wait()
        self.waits.append(found.numel())
        return found

    def is_here(self) -> bool:
        return False


class Watched(Wrapped):
    """Keeps how many elements each collective had that was waited for."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.waits: list[int] = []

    def arriving(self, arrival: Arrival) -> Arrival:
        return Waited(arrival, self.waits)


def test_a_layer_waits_for_its_own_weights_and_is_summed_when_it_is_done_with() -> None:
    state, tallies = ParallelState.recorded(Grid(2), rank=0)
    watched = Watched(state.dp_cp.comm)
    state = replace(state, dp_cp=replace(state.dp_cp, comm=watched))
    sizes = {"embedding.weight": 32, "layers.0.weight": 64, "layers.1.weight": 96, "layers.2.weight": 128}
    members = [(name, parameter(size)) for name, size in sizes.items()]
    buckets = GradientBuckets([members], state, bucket_elements=1, sharded=True, overlap=True)
    for bucket in buckets.buckets:
        bucket.start_gather()
    for layer, wanted in ((None, [32]), (1, [96]), (1, []), (0, [64])):
        buckets.await_weights(layer)
        assert watched.waits == wanted
        watched.waits.clear()
    buckets.settle()
    assert watched.waits == [128]
    buckets.zero_()
    for layer, calls in ((2, 1), (2, 1), (0, 3)):
        buckets.layer_done(0, layer)
        assert tallies["dp_cp"].calls["reduce_scatter"] == calls
    buckets.reduce(0)
    assert tallies["dp_cp"].calls["reduce_scatter"] == 4 and watched.waits == [128]
    buckets.reduce()
    assert len(watched.waits) == 5
