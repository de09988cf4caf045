"""The parity tests bite: each collective of the backward pass and each scaling factor, broken once, is noticed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.mistakes import Mistake, is_noticed
from ranks import run_on_ranks
from torch.distributed.fsdp import FSDPModule

from megatron_moe.certify.layouts import ZERO_3
from megatron_moe.certify.tiny_run import RankOutcome
from megatron_moe.layers import norm
from megatron_moe.layers.attention_core import GatheredAttention
from megatron_moe.moe import losses
from megatron_moe.moe.routers import router
from megatron_moe.optim import clip
from megatron_moe.optim.fully_sharded import ShardedParameter
from megatron_moe.optim.gradients import Bucket
from megatron_moe.parallel import collectives
from megatron_moe.parallel.layout import ParamLayout
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.training.objective import GlobalCounts

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP = "expert_model_parallel_size"
NO_SP = {TP: 2, "sequence_parallel": False}


def _backward(wrong: Callable[[Any, torch.Tensor], torch.Tensor], nones: int) -> Any:
    """A backward pass that computes its gradient in a wrong way."""
    return staticmethod(lambda ctx, grad: (wrong(ctx, grad), *([None] * nones)))


def _layout_without(axis: str) -> Callable[..., ParamLayout]:
    def make(*arguments: Any, **named: Any) -> ParamLayout:
        found = ParamLayout(*arguments, **named)
        return replace(found, sum_over=tuple(name for name in found.sum_over if name != axis))

    return make


def _own_rows(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    start = sum(ctx.rows[: ctx.axis.rank])
    return grad[start : start + ctx.rows[ctx.axis.rank]].clone()


def _others_missing(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    start = sum(ctx.rows[: ctx.axis.rank])
    whole = grad.new_zeros((sum(ctx.rows), *grad.shape[1:]))
    whole[start : start + grad.shape[0]] = grad
    return whole


def _reduce_without_further_axes(self: Bucket) -> None:
    self.sum_axes = []
    RIGHT_REDUCE(self)


def _reduce_and_average(self: Bucket) -> None:
    RIGHT_REDUCE(self)
    self.gradients.div_(self.axis.size)


def _accumulate_nowhere(self: ShardedParameter, gradients: torch.Tensor) -> None:
    self.own_gradients = gradients


def _local_norm(buckets: Any) -> float:
    return float(sum(float(bucket.own_gradients.square().sum()) for bucket in buckets.buckets) ** 0.5)


def _local_causal(self: Any, keys: int, sight: Any) -> torch.Tensor:
    return torch.ones(sight.queries.num_rows, keys, dtype=torch.bool).tril()[None, None]


def _draws_by_row(self: KeyedRandom, keys: torch.Tensor) -> torch.Tensor:
    return RIGHT_UNIFORM(self, torch.arange(keys.numel()).view(keys.shape))


RIGHT_REDUCE = Bucket.reduce
RIGHT_UNIFORM = KeyedRandom.uniform

MISTAKES = {
    "no sum of gradients behind a replicated input": Mistake(
        collectives._Copy, "backward", _backward(lambda ctx, grad: grad, 1), NO_SP
    ),
    "a replicated gradient summed again": Mistake(
        collectives._Reduce, "backward", _backward(lambda ctx, grad: grad * 2.0, 1), NO_SP
    ),
    "split gradients not gathered": Mistake(
        collectives._Split, "backward", _backward(lambda ctx, grad: torch.cat([grad, grad]), 1), NO_SP
    ),
    "gathered gradients cut at the wrong rank": Mistake(
        collectives._Gather, "backward", _backward(lambda ctx, grad: grad[: grad.shape[0] // 2].clone(), 2), NO_SP
    ),
    "partial gradients of gathered rows not summed": Mistake(
        collectives._GatherPartial, "backward", _backward(_own_rows, 2), {TP: 2}
    ),
    "keys and values without the other ranks' gradients": Mistake(
        collectives._GatherPartial, "backward", _backward(_own_rows, 2), {CP: 2}
    ),
    "no gather behind a reduce-scatter": Mistake(
        collectives._ReduceScatter, "backward", _backward(_others_missing, 2), {TP: 2}
    ),
    "gradients of expert rows do not travel back": Mistake(
        collectives._Exchange,
        "backward",
        _backward(lambda ctx, grad: grad.new_zeros((sum(ctx.send), *grad.shape[1:])), 3),
        {EP: 2},
    ),
    "norms not summed over tp": Mistake(norm, "ParamLayout", _layout_without("tp"), {TP: 2}),
    "routers not summed over tp": Mistake(router, "ParamLayout", _layout_without("tp"), {TP: 2}),
    "tied embeddings not summed over the pipeline": Mistake(Bucket, "reduce", _reduce_without_further_axes, {PP: 2}),
    "gradients averaged over replicas": Mistake(Bucket, "reduce", _reduce_and_average, {}),
    "sharded gradients averaged over replicas": Mistake(
        FSDPModule, "set_gradient_divide_factor", lambda self, factor: None, ZERO_3
    ),
    "sharded gradients that do not arrive": Mistake(ShardedParameter, "accumulate_in", _accumulate_nowhere, ZERO_3),
    "replicas counted twice in the norm": Mistake(Bucket, "speaks_for", lambda self, layout: True, {TP: 2}),
    "clipping by the norm of one rank": Mistake(clip, "global_norm", _local_norm, {}),
    "auxiliary losses not divided by the groups": Mistake(
        GlobalCounts, "aux_scale", lambda self, aux, layer: aux.weight / 2, {}
    ),
    "balance counts of one rank": Mistake(losses, "sum_over", lambda tensor, axis: tensor, {TP: 2}),
    "causal order by local rows": Mistake(GatheredAttention, "_mask", _local_causal, {CP: 2}),
    "random draws keyed by local rows": Mistake(KeyedRandom, "uniform", _draws_by_row, {TP: 2}),
}


def _with_mistakes(rank: int, world_size: int, names: list[str]) -> list[RankOutcome]:
    return [MISTAKES[name].run(world_size) for name in names]


@pytest.fixture(scope="module")
def wrong_runs() -> dict[str, list[RankOutcome]]:
    answers = run_on_ranks(2, _with_mistakes, list(MISTAKES))
    return {name: [rank[number] for rank in answers] for number, name in enumerate(MISTAKES)}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str, wrong_runs: dict[str, list[RankOutcome]]) -> None:
    assert is_noticed(MISTAKES[name], wrong_runs[name])
