"""Expert choice by a threshold: worked numbers, how the threshold moves, exact loads once it is known, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_rows import NOBODY, golden_router, make_router, pairs, rows_of, token_info, tp_state, weights_of
from ranks import run_on_ranks
from router_checks import HIDDEN, draw_tokens
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.routers.router import Router, Site


def by_threshold(experts: int = 4, **options: str) -> MoEConfig:
    return MoEConfig(num_experts=experts, router_type="expert_choice_threshold", router_options=options)


def step(router: Router, *microbatches: tuple[Tensor, TokenInfo]) -> list[float]:
    """The threshold after a step of these microbatches."""
    found = [router(tokens, info).stats for tokens, info in microbatches]
    own = {name: sum(stats[name].double() for stats in found) for name in found[0]}
    router.after_step(own, {})  # type: ignore[arg-type]
    values: list[float] = router.get_buffer("threshold").tolist()
    return values


def test_the_choice_by_hand_comes_out() -> None:
    router, tokens = golden_router(by_threshold())
    # nothing is known yet: 1/E
    found = weights_of(router(tokens, token_info(6)))
    first = {(0, 0): 0.6439, (1, 0): 0.5198, (2, 0): 0.8858, (3, 1): 0.5793, (4, 0): 0.4007, (4, 1): 0.3625}
    assert found == pytest.approx(first | {(5, 0): 0.2535, (5, 3): 0.3096}, abs=1e-4)
    # the third largest of each expert, 6·2/4 = 3
    assert step(router, (tokens, token_info(6))) == pytest.approx([0.5198, 0.2369, 0.1730, 0.1160], abs=1e-4)


def test_the_same_tokens_again_are_those_of_expert_choice_with_its_exact_loads() -> None:
    router, tokens = golden_router(by_threshold())
    info = token_info(6)
    step(router, (tokens, info))
    plan = router(tokens, info)
    # a score that equals the threshold reaches it
    assert pairs(plan) == {(t, e) for e, ts in enumerate([(2, 0, 1), (3, 4, 0), (3, 5, 1), (5, 3, 1)]) for t in ts}
    assert plan.tokens_per_expert().tolist() == [3] * 4
    free, _ = golden_router(MoEConfig(num_experts=4, router_type="expert_choice"))
    assert weights_of(plan) == weights_of(free(tokens, info))


def test_even_scores_reach_the_first_threshold_of_every_expert() -> None:
    router = make_router(by_threshold(), HIDDEN)
    plan = router(torch.zeros(3, HIDDEN, dtype=torch.float64), token_info(3))
    assert weights_of(plan) == {(token, expert): 0.25 for token in range(3) for expert in range(4)}


def scores_of(router: Router, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return (tokens @ router.get_parameter("weight").T).softmax(dim=1)


def test_a_step_is_the_mean_over_groups_and_the_threshold_moves_by_the_rest_of_momentum() -> None:
    router = make_router(by_threshold(capacity="1.5", momentum="0.75"), HIDDEN)
    # groups of 2·4 - 1 tokens, k = floor(2.625) = 2, of 4 tokens, k = 1, and one of padding only, which has no say
    info = token_info(4, 5, group_samples=2, padding=[(3, 1), *((p, 2) for p in range(4)), *((p, 3) for p in range(4))])
    expected = torch.zeros(4, dtype=torch.float64)
    for number in range(3):
        tokens = draw_tokens(info, number)
        scores = scores_of(router, tokens)
        first = scores[(info.groups == 0) & ~info.is_padding].sort(dim=0, descending=True).values
        last = scores[(info.groups == 2) & ~info.is_padding].sort(dim=0, descending=True).values
        assert (len(first), len(last)) == (7, 4)
        mean = (first[1] + last[0]) / 2
        expected = mean if number == 0 else 0.75 * expected + 0.25 * mean
        assert step(router, (tokens, info)) == pytest.approx(expected.tolist(), rel=1e-12)


def test_microbatches_count_by_their_groups() -> None:
    router = make_router(by_threshold(), HIDDEN)
    large, small = token_info(8, 3), token_info(8, 1)
    tokens, others = draw_tokens(large, 1), draw_tokens(small, 2)
    quantiles = [scores_of(router, tokens[sample::3]).sort(dim=0, descending=True).values[3] for sample in range(3)]
    quantiles.append(scores_of(router, others).sort(dim=0, descending=True).values[3])
    found = step(router, (tokens, large), (others, small))
    assert found == pytest.approx(torch.stack(quantiles).mean(dim=0).tolist(), rel=1e-12)


def test_without_momentum_the_last_step_alone_counts() -> None:
    router, other = (make_router(by_threshold(momentum="0"), HIDDEN) for _ in range(2))
    info = token_info(8)
    step(router, (draw_tokens(info, 1), info))
    assert step(router, (draw_tokens(info, 2), info)) == step(other, (draw_tokens(info, 2), info))


def test_a_step_without_tokens_changes_nothing() -> None:
    router = make_router(by_threshold(), HIDDEN)
    empty = token_info(2, padding=[(0, 0), (1, 0)])
    assert step(router, (draw_tokens(empty), empty)) == [0.25] * 4
    full = token_info(8)
    tokens = draw_tokens(full)
    known = step(router, (tokens, full))
    assert known == scores_of(router, tokens).sort(dim=0, descending=True).values[3].tolist()
    assert step(router, (draw_tokens(empty), empty)) == known


def test_the_load_settles_at_the_capacity() -> None:
    router = make_router(by_threshold(8, capacity="1.5"), HIDDEN)
    info = token_info(64)
    loads = torch.zeros(8)
    for number in range(80):
        tokens = draw_tokens(info, number)
        if number >= 30:
            loads += router(tokens, info).tokens_per_expert()
        step(router, (tokens, info))
    # 64 · 1.5 / 8 = 12
    assert (loads / 50).tolist() == pytest.approx([12.0] * 8, rel=0.15)


def test_a_token_is_decided_alone_and_alike_in_evaluation() -> None:
    router = make_router(by_threshold(), HIDDEN)
    info = token_info(8, 3, group_samples=2, padding=[(7, 2)])
    tokens = draw_tokens(info)
    step(router, (draw_tokens(info, 1), info))
    whole = router(tokens, info)
    alone: dict[tuple[int, int], float] = {}
    for row in range(24):
        rows = torch.tensor([row])
        alone |= weights_of(router(tokens[rows], rows_of(info, rows)), rows)
    assert alone == pytest.approx(weights_of(whole), rel=1e-12)
    assert not info.is_padding[torch.tensor([token for token, _ in alone])].any()
    evaluated = router(tokens, replace(info, train=False))
    assert weights_of(evaluated) == weights_of(whole)
    # evaluation leaves nothing behind
    assert not {"quantile_sum", "groups"} & evaluated.stats.keys()


def told_by_rank(rank: int, world_size: int) -> tuple[list[float], int]:
    info = token_info(6, 4, group_samples=3, padding=[(5, 0), (5, 3)])
    tokens = draw_tokens(info)
    rows = (torch.arange(24) % 5 % world_size == rank).nonzero()[:, 0]
    axis = NOBODY if world_size == 1 else tp_state(rank, world_size).tp_cp
    router = make_router(by_threshold(), HIDDEN, axis=axis)
    stats = router(tokens[rows], rows_of(info, rows)).stats
    return stats["quantile_sum"].tolist(), int(stats["groups"])


def test_ranks_that_share_groups_tell_of_them_once() -> None:
    alone, groups = told_by_rank(0, 1)
    assert groups == 2
    told = run_on_ranks(3, told_by_rank)
    assert sum(number for _, number in told) == 2
    assert [sum(values) for values in zip(*(values for values, _ in told), strict=True)] == pytest.approx(alone)


def test_the_threshold_is_saved_with_the_weights() -> None:
    router, other = make_router(by_threshold(), HIDDEN), make_router(by_threshold(), HIDDEN)
    info = token_info(8)
    step(router, (draw_tokens(info, 1), info))
    other.load_state_dict(router.state_dict())
    again = [step(each, (draw_tokens(info, 2), info)) for each in (router, other)]
    # it counts as set, so that the next step moves it and does not set it anew
    assert again[0] == again[1]
    assert again[0] != step(make_router(by_threshold(), HIDDEN), (draw_tokens(info, 2), info))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_options": {"capacity": "4.5"}}, r"capacity=4.5 asks for more experts per token than --num-experts 4"),
        ({"router_options": {"capacity": "-1"}}, r"capacity=-1: expected a number above 0"),
        ({"router_options": {"momentum": "1"}}, r"momentum=1: expected a number"),
        ({"router_options": {"momentum": "-0.1"}}, r"momentum=-0.1: expected a number"),
        ({"router_options": {"decay": "0.9"}}, r"no such option\. It knows capacity, momentum\."),
        ({"router_topk": 1}, r"--moe-router-topk 1 has no effect with the router expert_choice_threshold"),
        ({"router_pre_softmax": True}, r"--moe-router-pre-softmax .* no effect"),
        ({"aux_loss_coeff": 0.01}, r"--moe-aux-loss-coeff 0.01 has no effect"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(replace(by_threshold(), **fields), HIDDEN, Site(NOBODY))
