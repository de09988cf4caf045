"""Places at the experts, against a loop that serves one assignment after another."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_rows import GOLDEN_LOGITS, NOBODY, pairs, rows_of, token_info, tp_state
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import exact, expert_places, limit_is_causal, make_limit, sorted_order
from megatron_moe.moe.plan import RoutingPlan, TokenInfo, plan_from_choices

ROUNDING: dict[str, Callable[[Fraction], int]] = {"ceil": math.ceil, "floor": math.floor, "round": round}


def places(tokens: int, share: Fraction, rounding: str = "ceil", at_least: int = 0) -> int:
    return int(expert_places(torch.tensor(tokens), share=share, rounding=rounding, at_least=at_least))


def slow_limit(plan: RoutingPlan, info: TokenInfo, config: MoEConfig, capacity: list[int]) -> set[tuple[int, int]]:
    """Serve in order of (priority, key), one by one, while the group's expert has a place left."""
    by_weight = config.token_drop_policy == "probs"
    waiting = []
    for n in range(len(plan.token_ids)):
        token, expert = int(plan.token_ids[n]), int(plan.expert_ids[n])
        if expert < plan.num_experts:
            first = -plan.combine_weights[n].item() if by_weight else 0
            if not by_weight and plan.priority is not None:
                first = plan.priority[n].item()
            waiting.append((first, int(info.keys[token]), token, expert))
    taken: dict[tuple[int, int], int] = {}
    served = set()
    for _, _, token, expert in sorted(waiting):
        place = (int(info.groups[token]), expert)
        if taken.get(place, 0) < capacity[place[0]]:
            taken[place] = taken.get(place, 0) + 1
            served.add((token, expert))
    return served


@pytest.mark.parametrize(
    ("tokens", "factor", "choices", "experts", "expected"),
    [
        (2048, 1.25, 1, 32, {"ceil": 80, "floor": 80, "round": 80}),
        (2048, 1.25, 2, 32, {"ceil": 160, "floor": 160, "round": 160}),
        (1000, 1.25, 1, 16, {"ceil": 79, "floor": 78, "round": 78}),
        (10, 1.1, 1, 11, {"ceil": 1, "floor": 1, "round": 1}),  # in floating point 1.0000000000000002
        (5, 1.0, 1, 2, {"ceil": 3, "floor": 2, "round": 2}),  # halves to the even
        (7, 1.0, 1, 2, {"ceil": 4, "floor": 3, "round": 4}),
        (3, 100.0, 1, 2, {"ceil": 3, "floor": 3, "round": 3}),  # no more than there are tokens
        (0, 1.25, 2, 4, {"ceil": 0, "floor": 0, "round": 0}),
    ],
)
def test_places_follow_the_published_formulas(
    tokens: int, factor: float, choices: int, experts: int, expected: dict[str, int]
) -> None:
    assert {name: places(tokens, exact(factor) * choices / experts, name) for name in ROUNDING} == expected


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 10**6),
    factor=st.decimals("0.01", "8", places=3),
    experts=st.integers(1, 512),
    rounding=st.sampled_from(sorted(ROUNDING)),
    at_least=st.integers(0, 8),
)
def test_places_are_exact_for_every_decimal(tokens, factor, experts, rounding, at_least) -> None:  # type: ignore[no-untyped-def]
    share = Fraction(factor) / experts
    assert exact(float(factor)) / experts == share
    expected = min(max(ROUNDING[rounding](share * tokens), at_least), tokens)
    assert places(tokens, share, rounding, at_least) == expected


def test_rows_are_sorted_by_the_first_column_then_the_next() -> None:
    table = torch.tensor([[1, 5], [0, 7], [1, 2], [0, 7], [0, 3]])
    assert sorted_order(*table.unbind(dim=1)).tolist() == [4, 1, 3, 2, 0]
    assert sorted_order(torch.tensor([2, 1])).tolist() == [1, 0]


def random_plan(info: TokenInfo, num_experts: int, choices: int, seed: int, order: str) -> RoutingPlan:
    generator = torch.Generator().manual_seed(seed)
    tokens = len(info.keys)
    ids = torch.rand(tokens, num_experts, generator=generator).square().argsort(dim=1)[:, :choices]
    ids[::7, -1] = num_experts  # choices that a policy gave up
    weights = torch.randint(1, 4, (tokens, choices), generator=generator).to(torch.float64) / 4  # with ties
    scores = torch.randn(tokens, 1, generator=generator, dtype=torch.float64).round(decimals=1)
    priority = scores.expand(tokens, choices) if order == "confidence" else None
    return plan_from_choices(ids, weights, info, num_experts=num_experts, k_major=order == "k_major", priority=priority)


@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize("order", ["token_major", "k_major", "confidence"])
@pytest.mark.parametrize("seed", range(3))
def test_the_limit_serves_whom_the_loop_serves(policy: str, order: str, seed: int) -> None:
    samples, group_samples, choices, num_experts = [(4, 2, 2, 4), (3, 2, 3, 3), (3, 2, 2, 3)][seed]
    padding = [(6, 0), (6, 1)] + [(p, 2) for p in range(7)] * (seed == 2)
    info = token_info(7, samples, group_samples=group_samples, padding=padding)
    config = MoEConfig(
        num_experts=num_experts,
        router_topk=choices,
        expert_capacity_factor=0.7,
        token_drop_policy=policy,
        capacity_includes_k=bool(seed % 2),
        min_capacity=seed,
    )
    plan = random_plan(info, num_experts, choices, seed, order)
    limited = make_limit(config, choices, NOBODY)(plan, info)
    share = exact(0.7) * (choices if seed % 2 else 1) / num_experts
    capacity = [places(int(n), share, "ceil", seed) for n in info.group_tokens]
    assert pairs(limited) == slow_limit(plan, info, config, capacity)
    assert pairs(limited) < pairs(plan)  # it bites
    kept = limited.expert_ids < num_experts
    assert torch.equal(limited.expert_ids[kept], plan.expert_ids[kept])
    assert limited.combine_weights is plan.combine_weights


def golden_plan(k_major: bool, choices: int = 2, priority: Tensor | None = None) -> tuple[RoutingPlan, TokenInfo]:
    logits = torch.tensor(GOLDEN_LOGITS, dtype=torch.float64)
    ids = logits.sort(dim=1, descending=True, stable=True).indices[:, :choices]
    info = token_info(6)
    weights = logits.softmax(1).gather(1, ids)
    return plan_from_choices(ids, weights, info, num_experts=4, k_major=k_major, priority=priority), info


def test_first_choices_are_served_before_second_ones_in_gshards_order() -> None:
    plan, info = golden_plan(k_major=True)
    config = MoEConfig(num_experts=4, expert_capacity_factor=1.0)
    first = {(0, 0), (1, 0), (2, 0), (3, 1), (5, 3)}
    assert pairs(make_limit(config, 2, NOBODY)(plan, info)) == first | {(0, 1), (1, 1), (3, 2)}
    smaller = MoEConfig(num_experts=4, expert_capacity_factor=4 / 3, capacity_includes_k=False)
    assert pairs(make_limit(smaller, 2, NOBODY)(plan, info)) == {(0, 0), (1, 0), (3, 1), (5, 3), (0, 1), (3, 2)}


def test_switch_drops_from_left_to_right_and_by_confidence_when_told() -> None:
    config = MoEConfig(num_experts=4, router_topk=1, expert_capacity_factor=1.0)
    plan, info = golden_plan(k_major=False, choices=1)
    assert pairs(make_limit(config, 1, NOBODY)(plan, info)) == {(0, 0), (1, 0), (3, 1), (5, 3)}
    confidence = torch.tensor(GOLDEN_LOGITS, dtype=torch.float64).softmax(1).amax(1, keepdim=True)
    plan, info = golden_plan(k_major=False, choices=1, priority=-confidence)
    assert pairs(make_limit(config, 1, NOBODY)(plan, info)) == {(2, 0), (0, 0), (3, 1), (5, 3)}


def leak_example(last_choice: int, k_major: bool) -> set[tuple[int, int]]:
    """Two experts with three places each; token 0's second choice is expert 1."""
    first = torch.tensor([0, 1, 1, last_choice])
    info = token_info(4)
    ids = torch.stack([first, 1 - first], dim=1)
    plan = plan_from_choices(ids, torch.ones(4, 2), info, num_experts=2, k_major=k_major)
    config = MoEConfig(num_experts=2, expert_capacity_factor=0.75)
    return pairs(make_limit(config, 2, NOBODY)(plan, info))


def test_k_major_lets_an_earlier_token_see_a_later_one_and_token_major_does_not() -> None:
    assert (0, 1) not in leak_example(1, k_major=True)
    assert (0, 1) in leak_example(0, k_major=True)
    assert (0, 1) in leak_example(1, k_major=False)
    assert (0, 1) in leak_example(0, k_major=False)


@pytest.mark.parametrize(
    ("fields", "choices", "causal"),
    [
        ({"slot_priority": "k_major", "token_drop_policy": "probs"}, 2, True),  # dropless
        ({"expert_capacity_factor": 1.0}, 2, True),
        ({"expert_capacity_factor": 1.0, "slot_priority": "k_major"}, 2, False),
        ({"eval_capacity_factor": 1.0, "slot_priority": "k_major"}, 2, False),
        ({"expert_capacity_factor": 1.0, "slot_priority": "k_major"}, 1, True),
        ({"expert_capacity_factor": 1.0, "token_drop_policy": "probs"}, 1, False),
    ],
)
def test_a_limit_says_whether_it_sees_the_future(fields: dict[str, object], choices: int, causal: bool) -> None:
    assert limit_is_causal(MoEConfig(num_experts=4, **fields), choices) is causal  # type: ignore[arg-type]


def test_without_a_factor_the_plan_stays_as_it_is() -> None:
    plan, info = golden_plan(k_major=True)
    assert make_limit(MoEConfig(num_experts=4, min_capacity=1), 2, NOBODY)(plan, info) is plan


def test_evaluation_has_its_own_factor_or_that_of_training() -> None:
    plan, info = golden_plan(k_major=False)
    evaluating = token_info(6, train=False)

    def kept(where: TokenInfo, **factors: float) -> int:
        return len(pairs(make_limit(MoEConfig(num_experts=4, **factors), 2, NOBODY)(plan, where)))  # type: ignore[arg-type]

    tight = kept(info, expert_capacity_factor=0.5)
    assert tight < 12
    assert kept(evaluating, expert_capacity_factor=0.5) == tight
    assert kept(evaluating, expert_capacity_factor=0.5, eval_capacity_factor=4.0) == 12
    assert kept(info, eval_capacity_factor=0.5) == 12
    assert kept(evaluating, eval_capacity_factor=0.5) == tight


def test_padding_takes_no_place_and_makes_none() -> None:
    config = MoEConfig(num_experts=2, router_topk=1, expert_capacity_factor=1.0)
    info = token_info(6, padding=[(0, 0), (1, 0)])
    plan = plan_from_choices(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), info, num_experts=2)
    # four tokens, two experts: two places, for the first two tokens that are any
    assert pairs(make_limit(config, 1, NOBODY)(plan, info)) == {(2, 0), (3, 0)}


def test_equal_priorities_follow_the_keys_whatever_the_sign_of_their_zero() -> None:
    config = MoEConfig(num_experts=2, router_topk=1, expert_capacity_factor=1.0)
    info = token_info(4)
    priority = torch.tensor([[0.0], [-0.0], [-1.5], [-0.0]])
    plan = plan_from_choices(
        torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), info, num_experts=2, priority=priority
    )
    assert pairs(make_limit(config, 1, NOBODY)(plan, info)) == {(2, 0), (0, 0)}


def test_no_tokens_at_all_is_no_trouble() -> None:
    info = rows_of(token_info(4), torch.arange(0))
    plan = plan_from_choices(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), info, num_experts=3)
    config = MoEConfig(num_experts=3, expert_capacity_factor=1.0)
    assert make_limit(config, 2, NOBODY)(plan, info).expert_ids.shape == (0,)


def slow_pools(
    plan: RoutingPlan, info: TokenInfo, config: MoEConfig, capacity: list[int], pools: int
) -> set[tuple[int, int]]:
    """Pools with places for so many tokens, or so many assignments, served one by one."""
    width = config.num_experts // pools
    asked: dict[int, list[tuple[int, float, float]]] = {}
    for n, (token, expert) in enumerate(zip(plan.token_ids.tolist(), plan.expert_ids.tolist(), strict=True)):
        if expert < config.num_experts:
            rank = 0.0 if plan.priority is None else float(plan.priority[n])
            asked.setdefault(token, []).append((expert, float(plan.combine_weights[n]), rank))
    queue: list[tuple[tuple[float, ...], int, list[int]]] = []
    for token, entries in asked.items():
        sure = 0.0 if plan.confidence is None else float(plan.confidence[token])
        key = float(info.keys[token])
        if plan.indivisible:
            heaviest = max(weight for _, weight, _ in entries)
            first = {"position": 0.0, "probs": -heaviest, "bpr": -sure}[config.token_drop_policy]
            queue.append(((first, key), token, [expert for expert, _, _ in entries]))
        else:
            for expert, weight, rank in entries:
                order = {"position": (rank,), "probs": (-weight,), "bpr": (rank, -sure)}[config.token_drop_policy]
                queue.append(((*order, key), token, [expert]))
    taken: dict[tuple[int, int], int] = {}
    served = set()
    for _, token, experts in sorted(queue, key=lambda entry: entry[0]):
        place = (int(info.groups[token]), experts[0] // width)
        if taken.get(place, 0) < capacity[place[0]]:
            taken[place] = taken.get(place, 0) + 1
            served |= {(token, expert) for expert in experts}
    return served


def pooled_plan(info: TokenInfo, pools: int, width: int, choices: int, seed: int, k_major: bool) -> RoutingPlan:
    """Each token's choices in one pool, in an order of their own, with ties among weights and among tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(info.keys)
    pool = (torch.rand(tokens, 1, generator=generator).square() * pools).long()
    ids = pool * width + torch.rand(tokens, width, generator=generator).argsort(dim=1)[:, :choices]
    weights = torch.randint(1, 9, (tokens, choices), generator=generator).double() / 16
    sure = torch.randint(1, 5, (tokens,), generator=generator).double() / 4
    plan = plan_from_choices(ids, weights, info, num_experts=pools * width, k_major=k_major, confidence=sure)
    shuffled = torch.randperm(tokens * choices, generator=generator)
    names = ("token_ids", "expert_ids", "combine_weights") + (("priority",) if k_major else ())
    return replace(plan, indivisible=True, **{name: getattr(plan, name)[shuffled] for name in names})


POLICIES = ("position", "probs", "bpr")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("k_major", [False, True])
@pytest.mark.parametrize(("pools", "width", "choices"), [(2, 4, 3), (3, 2, 2), (4, 1, 1), (1, 5, 5)])
def test_an_indivisible_token_takes_one_place_of_its_pool_for_all_its_assignments(
    policy: str, k_major: bool, pools: int, width: int, choices: int
) -> None:
    info = token_info(7, 4, group_samples=2, padding=[(6, 0), (6, 1), (0, 3)])
    config = MoEConfig(
        num_experts=pools * width, router_topk=choices, expert_capacity_factor=0.7, token_drop_policy=policy
    )
    plan = pooled_plan(info, pools, width, choices, 5, k_major)
    limited = make_limit(config, choices, NOBODY, pools)(plan, info)
    capacity = [places(int(n), exact(0.7) / pools) for n in info.group_tokens]
    assert pairs(limited) == slow_pools(plan, info, config, capacity, pools)
    assert 0 < len(pairs(limited)) < len(pairs(plan))
    per_token = [sum(token == row for token, _ in pairs(limited)) for row in range(len(info.keys))]
    assert set(per_token) == {0, choices}


@pytest.mark.parametrize("policy", POLICIES)
def test_divisible_assignments_of_a_pool_take_a_place_each(policy: str) -> None:
    info = token_info(9, 2, group_samples=2)
    config = MoEConfig(num_experts=6, router_topk=3, expert_capacity_factor=0.7, token_drop_policy=policy)
    plan = replace(pooled_plan(info, 2, 3, 3, 6, k_major=True), indivisible=False)
    limited = make_limit(config, 3, NOBODY, 2)(plan, info)
    assert pairs(limited) == slow_pools(plan, info, config, [3 * places(18, exact(0.7) / 2)], 2)
    assert len(pairs(limited)) < len(pairs(plan))
    assert any(sum(token == row for token, _ in pairs(limited)) in (1, 2) for row in range(18))


def test_an_indivisible_token_without_assignments_takes_no_place() -> None:
    info = token_info(3)
    ids = torch.tensor([[4, 4], [0, 1], [1, 0]])
    plan = replace(plan_from_choices(ids, torch.ones(3, 2), info, num_experts=4), indivisible=True)
    config = MoEConfig(num_experts=4, expert_capacity_factor=0.5)
    assert pairs(make_limit(config, 2, NOBODY, 2)(plan, info)) == {(1, 0), (1, 1)}


CASES = [(policy, order) for policy in ("position", "probs") for order in ("token_major", "k_major", "confidence")]


def split_case(policy: str, order: str) -> tuple[RoutingPlan, TokenInfo, MoEConfig]:
    info = token_info(6, 4, group_samples=2, padding=[(5, 0), (5, 3)])
    config = MoEConfig(num_experts=4, expert_capacity_factor=0.6, token_drop_policy=policy)
    return random_plan(info, 4, 2, 5, order), info, config


def limited_on_rank(rank: int, world_size: int) -> list[list[tuple[int, int]]]:
    """The served pairs of a rank with an uneven part, out of order; rank 1 has none."""
    axis = tp_state(rank, world_size).tp_cp
    answers = []
    for policy, order in CASES:
        plan, info, config = split_case(policy, order)
        # a rank's rows need not be in order: context parallelism deals both ends of a sequence
        deal = torch.tensor([0, 2, 2, 3, 0, 3])[torch.arange(24) // 4]
        rows = (deal == rank).nonzero()[:, 0].flip(0)
        mine = rows_of(info, rows)
        here = (plan.token_ids[:, None] == rows).nonzero()
        part = RoutingPlan(
            num_tokens=len(rows),
            num_experts=4,
            token_ids=here[:, 1],
            expert_ids=plan.expert_ids[here[:, 0]],
            combine_weights=plan.combine_weights[here[:, 0]],
            priority=None if plan.priority is None else plan.priority[here[:, 0]],
        )
        served = pairs(make_limit(config, 2, axis)(part, mine))
        answers.append([(int(rows[token]), expert) for token, expert in served])
    return answers


def test_uneven_and_empty_ranks_decide_as_one_rank_does() -> None:
    answers = run_on_ranks(4, limited_on_rank)
    for case, (policy, order) in enumerate(CASES):
        plan, info, config = split_case(policy, order)
        whole = pairs(make_limit(config, 2, NOBODY)(plan, info))
        assert {tuple(pair) for answer in answers for pair in answer[case]} == whole
        assert len(whole) < len(pairs(plan))
