"""Expert choice: worked numbers, a loop over experts, and what the paper promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from moe_rows import golden_router, make_router, pairs, token_info, weights_of

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.plan import RoutingPlan, TokenInfo


def expert_choice(experts: int = 4, **options: str) -> MoEConfig:
    return MoEConfig(num_experts=experts, router_type="expert_choice", z_loss_coeff=0.001, router_options=options)


def chosen_by(plan: RoutingPlan, experts: int = 4) -> list[tuple[int, ...]]:
    """Each expert's tokens, the most wanted first."""
    order = weights_of(plan)
    return [tuple(token for token, expert in order if expert == e) for e in range(experts)]


def slow_choice(scores: np.ndarray, info: TokenInfo, c: float, rounding: str) -> dict[tuple[int, int], float]:
    """Expert by expert, the best tokens of each group."""
    answer: dict[tuple[int, int], float] = {}
    experts = scores.shape[1]
    for group in range(info.num_groups):
        members = [t for t in range(len(scores)) if info.groups[t] == group and not info.is_padding[t]]
        share = len(members) * c / experts
        places = min(max(1, round(share) if rounding == "round" else int(share)), len(members))
        for expert in range(experts):
            wishes = sorted(members, key=lambda t: (-scores[t, expert], int(info.keys[t])))
            answer |= {(t, expert): scores[t, expert] for t in wishes[:places]}
    return answer


def test_the_worked_choices_come_out() -> None:
    router, tokens = golden_router(expert_choice())
    plan = router(tokens, token_info(6))
    assert chosen_by(plan) == [(2, 0, 1), (3, 4, 0), (3, 5, 1), (5, 3, 1)]
    expected = [0.8858, 0.6439, 0.5198, 0.5793, 0.3625, 0.2369, 0.2131, 0.2075, 0.1730, 0.3096, 0.1293, 0.1160]
    assert plan.combine_weights.tolist() == pytest.approx(expected, abs=1e-4)
    assert plan.mask().sum(dim=1).tolist() == [2, 3, 1, 3, 1, 2]
    smaller, _ = golden_router(expert_choice(capacity="1.4"))
    plan = smaller(tokens, token_info(6))
    assert chosen_by(plan) == [(2, 0), (3, 4), (3, 5), (5, 3)]
    assert plan.mask().sum(dim=1).tolist() == [1, 0, 1, 3, 1, 2]


@pytest.mark.parametrize(
    ("length", "samples", "group_samples", "experts", "c", "rounding"),
    [
        (6, 4, 2, 4, 2.0, "floor"),
        (7, 3, 2, 5, 1.3, "round"),  # a short last group
        (5, 2, 1, 8, 1.0, "floor"),  # fewer tokens than experts
        (9, 2, 2, 3, 3.0, "round"),  # everybody takes everything
        (4, 2, 1, 3, 0.9, "round"),
    ],
)
def test_expert_choice_equals_the_loop(
    length: int, samples: int, group_samples: int, experts: int, c: float, rounding: str
) -> None:
    padding = [(length - 1, 0), (length - 2, 0), (length - 1, samples - 1)]
    info = token_info(length, samples, group_samples=group_samples, padding=padding)
    # rows in any order: what counts is the key
    shuffle = torch.randperm(length * samples)
    info = replace(
        info, **{name: getattr(info, name)[shuffle] for name in ("groups", "keys", "is_padding", "positions")}
    )
    router = make_router(expert_choice(experts, capacity=str(c), rounding=rounding), 5)
    tokens = torch.randint(-1, 2, (length * samples, 5)).double()  # many ties
    plan = router(tokens, info)
    with torch.no_grad():
        scores = (tokens @ router.get_parameter("weight").T).softmax(dim=1).numpy()
    assert weights_of(plan) == pytest.approx(slow_choice(scores, info, c, rounding), rel=1e-12)


def test_a_group_of_padding_only_is_left_alone() -> None:
    info = token_info(4, 2, padding=[(p, 1) for p in range(4)])
    router = make_router(expert_choice(), 5)
    plan = router(torch.randn(8, 5, dtype=torch.float64), info)
    assert plan.tokens_per_expert().tolist() == [2, 2, 2, 2]
    assert {token % 2 for token, _ in pairs(plan)} == {0}


def test_every_expert_takes_the_same_number_of_different_tokens() -> None:
    router = make_router(expert_choice(8), 5)
    plan = router(torch.randn(64, 5, dtype=torch.float64), token_info(32, 2))
    assert plan.tokens_per_expert().tolist() == [16] * 8
    assert plan.mask().sum(dim=0).tolist() == [16] * 8
    assert (plan.combine_weights.new_zeros(64).index_add(0, plan.token_ids, plan.combine_weights) <= 1 + 1e-12).all()


def test_among_equals_the_earliest_tokens_are_taken() -> None:
    router = make_router(expert_choice(), 5)
    router.weight.data.zero_()  # a product of equal rows may differ in its last bit; of zeros it cannot
    plan = router(torch.ones(8, 5, dtype=torch.float64), token_info(8))
    assert chosen_by(plan) == [(0, 1, 2, 3)] * 4


def test_a_token_that_an_expert_wants_more_stays_with_it() -> None:
    router, tokens = golden_router(expert_choice())
    info = token_info(6)
    before = pairs(router(tokens, info))
    for token, expert in before:
        raised = tokens.clone()
        raised[token, expert] += 0.5
        assert (token, expert) in pairs(router(raised, info))


def test_one_expert_for_all_is_the_dense_layer() -> None:
    config = MoEConfig(num_experts=1, router_type="expert_choice", router_topk=1, router_options={"capacity": "1"})
    router = make_router(config, 5)
    plan = router(torch.randn(6, 5, dtype=torch.float64), token_info(6))
    assert weights_of(plan) == {(token, 0): 1.0 for token in range(6)}
