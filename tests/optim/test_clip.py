"""The norm counts each number of the model once, wherever it lies."""

import math

import pytest
import torch
from optim.toy_model import Oracle, Training, accumulate, build, initial_weights, make, make_buckets
from ranks import run_on_ranks

from megatron_moe.optim.clip import clip_, clip_scale, global_norm
from megatron_moe.optim.gradients import GradientBuckets
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import ParamLayout
from megatron_moe.parallel.state import ParallelState


def one_parameter(gradient: torch.Tensor) -> GradientBuckets:
    stage = make({"weight": ParamLayout(tuple(gradient.shape))}, ParallelState.alone(), torch.float32)
    buckets = make_buckets([stage], ParallelState.alone(), sharded=True)
    stage.get_parameter("weight").main_grad.copy_(gradient)  # type: ignore[attr-defined]
    buckets.reduce()
    return buckets


def test_three_four_five() -> None:
    buckets = one_parameter(torch.tensor([3.0, 4.0]))
    assert clip_(buckets, 1.0) == 5.0
    assert buckets.buckets[0].own_gradients[:2].tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_a_small_gradient_and_a_limit_of_zero_change_nothing() -> None:
    for limit in (5.1, 0.0):
        buckets = one_parameter(torch.tensor([3.0, 4.0]))
        assert clip_(buckets, limit) == 5.0
        assert buckets.buckets[0].own_gradients[:2].tolist() == [3.0, 4.0]


def test_the_scale_is_megatrons() -> None:
    assert clip_scale(2.0, 1.0) == 1.0 / 2.000001
    assert clip_scale(1.0, 1.0) == 1.0 / 1.000001
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(9.0, 0.0) == 1.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_told_and_scales_nothing(bad: float) -> None:
    buckets = one_parameter(torch.tensor([3.0, bad, 4.0]))
    assert not math.isfinite(clip_(buckets, 1.0))
    assert buckets.buckets[0].own_gradients[[0, 2]].tolist() == [3.0, 4.0]


def test_a_long_float32_gradient_keeps_its_digits() -> None:
    # one running float32 sum of these 4 M + 1 squares is off by 2e-3
    gradient = torch.full((2**22 + 1,), 0.1)
    want = math.sqrt((gradient.double() ** 2).sum())
    assert global_norm(one_parameter(gradient)) == pytest.approx(want, rel=1e-6)


GRIDS = {
    2: [{}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"ep": 2}, {"etp": 2}],
    4: [
        {"tp": 2, "etp": 2},
        {"tp": 2, "ep": 2},
        {"tp": 4},
        {"ep": 2, "etp": 2},
        {"tp": 2, "pp": 2},
        {"pp": 2, "ep": 2},
        {"cp": 2, "tp": 2, "ep": 4},
    ],
}


def norms_on_all_layouts(rank: int, world_size: int) -> list[float]:
    found = []
    for sizes in GRIDS[world_size]:
        state = ParallelState.distributed(Grid(world_size, **sizes))
        for sharded in (True, False):
            stages = build(state, torch.float64)
            buckets = make_buckets(stages, state, sharded)
            accumulate(stages, state, step=0)
            buckets.reduce()
            found.append(global_norm(buckets))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_number_is_counted_once_on_every_layout(world_size: int) -> None:
    want = Oracle(initial_weights(torch.float64)).run(1).norms[0]
    found = run_on_ranks(world_size, norms_on_all_layouts)
    assert all(norms == found[0] for norms in found)  # the same bits on every rank
    assert found[0] == pytest.approx([want] * 2 * len(GRIDS[world_size]), rel=1e-13)


def one_rank_is_infinite(rank: int, world_size: int) -> bool:
    state = ParallelState.distributed(Grid(world_size, ep=2))
    training = Training(state)
    before = [weight.detach().clone() for _, weight in training.parameters()]
    accumulate(training.stages, state, step=0)
    if rank == 1:
        experts = dict(training.parameters())["layers.1.mlp.experts.w1"]
        experts.main_grad[0, 0, 0, 0] = math.inf  # type: ignore[attr-defined]
    training.buckets.reduce()
    norm = clip_(training.buckets, 1.0)
    kept = all(torch.equal(old, weight) for old, (_, weight) in zip(before, training.parameters(), strict=True))
    return kept and not math.isfinite(norm)


def test_every_rank_hears_of_one_infinite_expert() -> None:
    assert run_on_ranks(2, one_rank_is_infinite) == [True, True]
