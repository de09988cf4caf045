"""The parity tests bite: each collective of the backward pass and each scaling factor, broken once, is noticed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.mistakes import Mistake, is_noticed, lazy_gathers
from ranks import run_on_ranks
from torch.distributed.fsdp import FSDPModule

from megatron_moe.certify.layouts import ZERO_3
from megatron_moe.certify.tiny_run import RankOutcome
from megatron_moe.layers import all_to_all_attention, norm, parallel_linear, ring_attention
from megatron_moe.layers.attention_core import GatheredAttention
from megatron_moe.layers.linear import weight_gradient
from megatron_moe.layers.parallel_linear import TensorSplit
from megatron_moe.models import build
from megatron_moe.moe import losses
from megatron_moe.moe.routers import router
from megatron_moe.optim import clip
from megatron_moe.optim.bucket import Bucket
from megatron_moe.optim.fully_sharded import ShardedParameter
from megatron_moe.optim.gradients import GradientBuckets
from megatron_moe.parallel import collectives
from megatron_moe.parallel.arrival import Landed
from megatron_moe.parallel.in_pieces import places
from megatron_moe.parallel.layout import ParamLayout
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.ring import Homeward
from megatron_moe.training.objective import GlobalCounts

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP = "expert_model_parallel_size"
RELATIVE = {
    "position_embedding_type": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
RING, ALL_TO_ALL = {CP: 2, "cp_comm_type": "p2p"}, {CP: 2, "cp_comm_type": "a2a"}
NO_SP = {TP: 2, "sequence_parallel": False}
OVERLAP = {"tp_comm_overlap": True}


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


def _alone(rows: torch.Tensor, split: TensorSplit) -> torch.Tensor:
    """A rank's rows, and zeros in the others' places."""
    whole = rows.new_zeros((split.rows, *rows.shape[1:]))
    whole[places(split.shares)[split.tp.rank]] = rows
    return whole


def _input_gradient_not_summed(ctx: Any, grad: torch.Tensor) -> Any:
    _, *others = RIGHT_COLUMNS(ctx, grad)
    part = grad @ ctx.saved_tensors[1].view(ctx.out_features, -1)
    return (part[places(ctx.split.shares)[ctx.split.tp.rank]] if ctx.split.sequence_parallel else part, *others)


def _gradient_not_gathered(ctx: Any, grad: torch.Tensor) -> Any:
    inner, weight = ctx.saved_tensors
    whole = _alone(grad, ctx.split)
    grad_weight = weight_gradient(ctx.parameter, whole, lambda: inner, ctx.sink)
    return whole @ weight.view(ctx.out_features, -1), grad_weight, None, None, None


def _reduce_without_further_axes(self: Bucket) -> None:
    self.sum_axes = []
    RIGHT_REDUCE(self)


def _reduce_and_average(self: Bucket) -> None:
    RIGHT_REDUCE(self)
    self.gradients.div_(self.axis.size)


def _accumulate_nowhere(self: ShardedParameter, gradients: torch.Tensor) -> None:
    self.own_gradients = gradients


def _local_norm(buckets: Any, health: torch.Tensor | None = None) -> float:
    return float(sum(float(bucket.own_gradients.square().sum()) for bucket in buckets.buckets) ** 0.5)


def _local_causal(self: Any, keys: int, sight: Any) -> torch.Tensor:
    return torch.ones(sight.queries.num_rows, keys, dtype=torch.bool).tril()[None, None]


def _draws_by_row(self: KeyedRandom, keys: torch.Tensor) -> torch.Tensor:
    return RIGHT_UNIFORM(self, torch.arange(keys.numel()).view(keys.shape))


RIGHT_COLUMNS = parallel_linear._ColumnLinear.backward
RIGHT_REDUCE = Bucket.finish_reduce
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
    "overlapped, no sum of gradients behind a replicated input": Mistake(
        parallel_linear._ColumnLinear, "backward", staticmethod(_input_gradient_not_summed), {**NO_SP, **OVERLAP}
    ),
    "overlapped, partial gradients of gathered rows not summed": Mistake(
        parallel_linear._ColumnLinear, "backward", staticmethod(_input_gradient_not_summed), {TP: 2, **OVERLAP}
    ),
    "overlapped, the input not gathered again": Mistake(
        parallel_linear, "_start_gather", lambda own, split: Landed(_alone(own, split)), {TP: 2, **OVERLAP}
    ),
    "overlapped, no gather behind a sum of shares": Mistake(
        parallel_linear._RowLinear, "backward", staticmethod(_gradient_not_gathered), {TP: 2, **OVERLAP}
    ),
    "gradients of expert rows do not travel back": Mistake(
        collectives._Depart,
        "backward",
        _backward(lambda ctx, grad: torch.zeros_like(ctx.journey.gradients.wait()), 2),
        {EP: 2},
    ),
    "norms not summed over tp": Mistake(norm, "ParamLayout", _layout_without("tp"), {TP: 2}),
    "routers not summed over tp": Mistake(router, "ParamLayout", _layout_without("tp"), {TP: 2}),
    "tied embeddings not summed over the pipeline": Mistake(
        Bucket, "finish_reduce", _reduce_without_further_axes, {PP: 2}
    ),
    "two stages of a rank with a parameter each": Mistake(
        build, "_share", lambda stages: None, {PP: 2, "num_virtual_stages_per_pipeline_rank": 2}, model=RELATIVE
    ),
    "a bucket summed before all of its layers are done": Mistake(
        Bucket, "is_done_with", lambda self, layer: None not in self.layers, {}
    ),
    "a layer run before its weights have been gathered": Mistake(
        GradientBuckets, "await_weights", lambda self, layer: None, {}, network=lazy_gathers
    ),
    "gradients averaged over replicas": Mistake(Bucket, "finish_reduce", _reduce_and_average, {}),
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
    "keys that travelled bring no gradients home": Mistake(
        Homeward, "total", lambda self: self._own + 0.0 * self._arriving.wait(), RING
    ),
    "tiles of a ring told by neighbouring chunks": Mistake(
        ring_attention, "own_chunks", lambda size, rank: (2 * rank, 2 * rank + 1), RING
    ),
    "exchanged rows left in the order of their ranks": Mistake(
        all_to_all_attention, "sequence_order", lambda length, size, device: torch.arange(length), ALL_TO_ALL
    ),
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
