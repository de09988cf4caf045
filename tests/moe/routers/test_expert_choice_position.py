"""Expert choice by position: worked numbers, exact loads, rivals at one position only, decoding, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_rows import NOBODY, make_router, pairs, rows_of, token_info, weights_of
from router_checks import HIDDEN, draw_tokens

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.routers.router import Router, Site


def by_position(samples: int = 4, experts: int = 4, **options: str) -> MoEConfig:
    return MoEConfig(
        num_experts=experts,
        router_type="expert_choice_position",
        routing_group_samples=samples,
        router_options=options,
    )


def two_experts(logits: list[float]) -> tuple[Router, torch.Tensor]:
    """Two experts, each taking half of the tokens; a token's logits are (z, 0), its scores sigmoids of z and -z."""
    router = make_router(by_position(4, 2, capacity="1"), 2)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(2))
    return router, torch.tensor([[z, 0.0] for z in logits], dtype=torch.float64)


def test_the_choice_by_hand_comes_out() -> None:
    # two positions of four sequences; with all eight as rivals expert 0 would take tokens 0, 1, 6 and 2, not 5
    router, tokens = two_experts([2.0, 1.0, 0.0, -1.0, -3.0, -1.0, 1.0, -2.0])
    found = weights_of(router(tokens, token_info(2, 4, group_samples=4)))
    first = {(0, 0): 0.8808, (1, 0): 0.7311, (2, 1): 0.5, (3, 1): 0.7311}
    second = {(6, 0): 0.7311, (5, 0): 0.2689, (4, 1): 0.9526, (7, 1): 0.8808}
    assert found == pytest.approx(first | second, abs=1e-4)


@pytest.mark.parametrize(
    ("experts", "samples", "capacity", "load"),
    [
        (4, 8, "2", 4),
        (4, 4, "1.3", 1),
        (4, 3, "2", 2),  # 1.5, a half, to the even
        (4, 10, "1", 2),  # 2.5, too
        (4, 6, "2.5", 4),  # 3.75
        (8, 2, "1", 1),  # 0.25, but one at least
        (4, 3, "4", 3),  # everybody takes everybody
    ],
)
def test_each_expert_has_the_same_load_at_each_position(experts: int, samples: int, capacity: str, load: int) -> None:
    router = make_router(by_position(samples, experts, capacity=capacity), HIDDEN)
    info = token_info(5, 2 * samples, group_samples=samples)
    mask = router(draw_tokens(info), info).mask()
    for position in range(5):
        for group in range(2):
            here = (info.positions == position) & (info.groups == group)
            assert mask[here].sum(dim=0).tolist() == [load] * experts


def test_padding_is_no_rival_and_leaves_fewer_places() -> None:
    info = token_info(3, 4, group_samples=4, padding=[(1, 0), (1, 1), *((2, sample) for sample in range(4))])
    plan = make_router(by_position(), HIDDEN)(draw_tokens(info), info)
    mask = plan.mask()
    # c·B/E of four, of two and of no tokens
    assert [mask[info.positions == p].sum(dim=0).tolist() for p in range(3)] == [[2] * 4, [1] * 4, [0] * 4]
    assert not mask[info.is_padding].any()


def test_a_short_last_group_shares_its_own_places() -> None:
    info = token_info(4, 6, group_samples=4)
    mask = make_router(by_position(), HIDDEN)(draw_tokens(info), info).mask()
    loads = [mask[(info.positions == p) & (info.groups == g)].sum(dim=0).tolist() for p in range(4) for g in range(2)]
    assert loads == [[2] * 4, [1] * 4] * 4


def test_among_equals_the_earlier_sequences_are_taken() -> None:
    router, tokens = two_experts([0.0] * 8)
    plan = router(tokens, token_info(2, 4, group_samples=4))
    assert pairs(plan) == {(t, e) for t in (0, 1, 4, 5) for e in range(2)}


def test_only_tokens_at_the_same_position_compete() -> None:
    router = make_router(by_position(), HIDDEN)
    info = token_info(6, 4, group_samples=4)
    tokens = draw_tokens(info)
    before = router(tokens, info).mask()
    rivals_matter = False
    for trial in range(10):
        position, sample = trial % 6, trial % 4
        other = tokens.clone()
        other[(info.positions == position) & (info.sequences == sample)] = 3 * draw_tokens(info, 50 + trial)[0]
        after = router(other, info).mask()
        elsewhere = info.positions != position
        assert torch.equal(after[elsewhere], before[elsewhere])
        rival = (info.positions == position) & (info.sequences != sample)
        rivals_matter |= not torch.equal(after[rival], before[rival])
    assert rivals_matter


def test_decoding_position_by_position_repeats_the_whole() -> None:
    router = make_router(by_position(3), HIDDEN)
    info = token_info(7, 5, group_samples=3, padding=[(6, 1), (5, 1)], train=False)
    tokens = draw_tokens(info)
    whole = weights_of(router(tokens, info))
    steps: dict[tuple[int, int], float] = {}
    # two positions at once, then one by one, as after a prompt
    for start, end in ((0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)):
        rows = ((info.positions >= start) & (info.positions < end)).nonzero()[:, 0]
        here = rows_of(info, rows)
        counts = here.groups[~here.is_padding].bincount(minlength=2)
        here = replace(here, start=start, group_size=(end - start) * 3, group_tokens=counts)
        steps |= weights_of(router(tokens[rows], here), rows)
    assert steps == pytest.approx(whole, rel=1e-12)


def test_sequences_of_one_token_are_plain_expert_choice() -> None:
    plain = MoEConfig(num_experts=4, router_type="expert_choice", router_options={"rounding": "round"})
    router, other = make_router(by_position(9), HIDDEN), make_router(plain, HIDDEN)
    other.load_state_dict(router.state_dict())
    info = token_info(1, 13, group_samples=9, padding=[(0, 4)])
    tokens = draw_tokens(info)
    assert weights_of(router(tokens, info)) == weights_of(other(tokens, info))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing_group_samples": 1}, r"--moe-routing-group-samples 1 leaves one token .*; use 2 or more"),
        ({"router_options": {"capacity": "5"}}, r"capacity=5 asks for more experts per token than --num-experts 4"),
        ({"router_options": {"capacity": "0"}}, r"capacity=0: expected a number above 0"),
        ({"router_options": {"rounding": "up"}}, r"rounding=up: expected floor or round"),
        ({"router_topk": 1}, r"--moe-router-topk 1 has no effect with the router expert_choice_position"),
        ({"aux_loss_coeff": 0.01}, r"--moe-aux-loss-coeff 0.01 has no effect"),
        ({"expert_capacity_factor": 1.0}, r"--moe-expert-capacity-factor 1.0 has no effect"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(replace(by_position(), **fields), HIDDEN, Site(NOBODY))
