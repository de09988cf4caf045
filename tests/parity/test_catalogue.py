"""Mistakes that were found in other people's parallel training, each put in once: parity with one process notices it.

The numbers are those of issues of NVIDIA/Megatron-LM in which a layout changed the numbers without a word. Of the
rest of that list: "position" as a drop policy is first come, first served, and a token without any place passes
unchanged, in tests/moe/test_capacity.py; which way padding masks point is one property, TokenInfo.is_padding.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.mistakes import MOE, Mistake, is_noticed
from ranks import run_on_ranks

from megatron_moe.certify.tiny_run import RankOutcome
from megatron_moe.layers import cross_attention
from megatron_moe.layers.linear import linear
from megatron_moe.moe import experts, layer, losses
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.optim.bucket import Bucket
from megatron_moe.parallel.layout import ParamLayout
from megatron_moe.training import objective
from megatron_moe.training.objective import GlobalCounts
from megatron_moe.training.step import Findings

TP, EP, ETP = "tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
NO_SP = {TP: 2, "sequence_parallel": False}
RIGHT_LOSS, RIGHT_INFO = objective.vocabulary_cross_entropy, layer.token_info
RIGHT_SPEAKS, RIGHT_SCALE, RIGHT_NUMBER = Bucket.speaks_for, GlobalCounts.aux_scale, GlobalCounts.number_of
RIGHT_REPORT, RIGHT_COUNTS = Findings.add_report, losses.choice_counts
TWO_STACKS = {"encoder_num_layers": 2}


def info_with(**changes: Any) -> Any:
    """token_info with some of its answers computed wrongly: name -> function of (info, ctx, tp)."""

    def wrong(ctx: Any, tp: Any, index: int, group_samples: int) -> TokenInfo:
        info = RIGHT_INFO(ctx, tp, index, group_samples)
        return replace(info, **{name: change(info, ctx, tp) for name, change in changes.items()})

    return wrong


def _first_rows_padding(info: TokenInfo, ctx: Any, tp: Any) -> torch.Tensor:
    """That of the first tensor-parallel rank's rows."""
    padding: torch.Tensor = (ctx.view.segments < 0).flatten()[: len(info.is_padding)]
    return padding


def _half_of_experts(*arguments: Any, **named: Any) -> ParamLayout:
    return ParamLayout(*arguments, **{**named, "reduce_over": "dp_cp"})


CATALOGUE = {
    "#7452, cross-entropy of gathered logits: ln(tp) too much": Mistake(
        objective,
        "vocabulary_cross_entropy",
        lambda logits, labels, size, tp: RIGHT_LOSS(logits, labels, size, tp) + math.log(tp.size),
        {TP: 2},
    ),
    "#7452, padding of another rank's rows": Mistake(
        layer, "token_info", info_with(is_padding=_first_rows_padding), {TP: 2}
    ),
    "#7452, keys and values of cross-attention outside the tensor-parallel group": Mistake(
        cross_attention,
        "column_linear",
        lambda hidden, weight, size, split, sink: linear(hidden, weight, size, sink),
        NO_SP,
        model=TWO_STACKS,
    ),
    "#7452, parameters left out of the clipping norm": Mistake(
        Bucket, "speaks_for", lambda self, layout: RIGHT_SPEAKS(self, layout) and "tp" not in layout.sum_over, {}
    ),
    "#7481, a count that a sum over ranks has overwritten": Mistake(
        layer, "token_info", info_with(group_tokens=lambda info, ctx, tp: info.group_tokens * tp.size), {TP: 2}
    ),
    "#7213, accumulated counts divided by one micro-batch": Mistake(
        GlobalCounts, "number_of", lambda self, unit, index: max(1, RIGHT_NUMBER(self, unit, index) // 2), {}
    ),
    "#3672, auxiliary gradients divided by the world": Mistake(
        GlobalCounts, "aux_scale", lambda self, loss, index: RIGHT_SCALE(self, loss, index) / 2, {}
    ),
    "#5047, auxiliary gradients multiplied by the tensor size": Mistake(
        GlobalCounts, "aux_scale", lambda self, loss, index: RIGHT_SCALE(self, loss, index) * 2, {TP: 2}
    ),
    "#5798, a loss of each sequence taken over the micro-batch": Mistake(
        layer,
        "token_info",
        info_with(
            groups=lambda info, ctx, tp: torch.zeros_like(info.groups),
            group_tokens=lambda info, ctx, tp: info.group_tokens.sum().expand_as(info.group_tokens),
        ),
        {},
        micro_batch_size=2,
    ),
    "#5916, experts missing from the norm where experts are folded over tensor parallelism": Mistake(
        Bucket,
        "speaks_for",
        lambda self, layout: RIGHT_SPEAKS(self, layout) and (layout.reduce_over != "edp" or self._state.tp.is_first),
        {TP: 2, EP: 2, ETP: 1},
    ),
    "#5916, expert gradients summed over the replicas of dense parameters": Mistake(
        experts, "ParamLayout", _half_of_experts, {TP: 2, ETP: 1}
    ),
    "#6111, padding counted for the expert bias": Mistake(
        layer,
        "token_info",
        info_with(is_padding=lambda info, ctx, tp: torch.zeros_like(info.is_padding)),
        {},
        moe={"router_type": "deepseek_v3", "router_options": {"bias_update_rate": "0.1"}},
    ),
    "#1514, auxiliary losses counted again by recomputation": Mistake(
        Findings,
        "add_report",
        lambda self, report: (RIGHT_REPORT(self, report), RIGHT_REPORT(self, report)),
        {"recompute_granularity": "full"},
    ),
    "#1513, balance counted after tokens were dropped": Mistake(
        losses,
        "choice_counts",
        lambda *arguments, **named: RIGHT_COUNTS(*arguments, **named).clamp(max=1),
        {},
        moe={**MOE, "expert_capacity_factor": 0.5},
    ),
}


def _with_mistakes(rank: int, world_size: int, names: list[str], broken: bool) -> list[RankOutcome]:
    return [CATALOGUE[name].run(world_size, broken=broken) for name in names]


@pytest.fixture(scope="module")
def wrong_runs() -> dict[str, list[RankOutcome]]:
    answers = run_on_ranks(2, _with_mistakes, list(CATALOGUE), True)
    return {name: [rank[number] for rank in answers] for number, name in enumerate(CATALOGUE)}


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_mistake_of_the_catalogue_is_noticed(name: str, wrong_runs: dict[str, list[RankOutcome]]) -> None:
    assert is_noticed(CATALOGUE[name], wrong_runs[name])


def test_nothing_is_noticed_without_a_mistake() -> None:
    answers = run_on_ranks(2, _with_mistakes, list(CATALOGUE), False)
    for number, (name, mistake) in enumerate(CATALOGUE.items()):
        assert not is_noticed(mistake, [rank[number] for rank in answers]), name
