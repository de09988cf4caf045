"""Mixture-of-Depths decides: worked numbers, a loop over sequences, what padding may do, and what is refused."""

from collections.abc import Sequence

import pytest
import torch
from moe_rows import make_router, token_info
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.moe.routers.router import Router

# eight tokens' scores, of which the paper's rule takes the third and the last
R = [0.3, -0.1, 1.2, 0.8, -0.5, 0.0, 0.4, 0.9]


def depths(**options: str) -> Router:
    """A router of one number for each token, which is its score."""
    config = MoEConfig(num_experts=1, router_topk=1, router_type="mixture_of_depths", router_options=options)
    router = make_router(config, 1)
    with torch.no_grad():
        router.get_parameter("weight").fill_(1.0)
    return router


def column(scores: Sequence[float]) -> Tensor:
    return torch.tensor(scores, dtype=torch.float64)[:, None]


def taken(plan: RoutingPlan) -> list[int]:
    return plan.mask()[:, 0].nonzero()[:, 0].tolist()


def test_the_worked_choice_keeps_the_raw_score_as_weight() -> None:
    plan = depths(capacity="0.25")(column(R), token_info(8))
    assert taken(plan) == [2, 7]
    assert plan.combine_weights.tolist() == pytest.approx([0, 0, 1.2, 0, 0, 0, 0, 0.9])
    assert plan.tokens_per_expert().tolist() == [2]


def test_the_worked_cross_entropy_and_its_gradient() -> None:
    tokens = column(R).requires_grad_()
    plan = depths(capacity="0.25", predictor_coeff="0.3")(tokens, token_info(8))
    loss = plan.aux_losses["predictor_loss"]
    assert (loss.share.item() / 8, loss.weight, loss.per) == (pytest.approx(0.6693, abs=1e-4), 0.3, "token")
    loss.share.backward()
    target = torch.tensor([0, 0, 1, 0, 0, 0, 0, 1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(tokens.grad, column(R).sigmoid() - target)


def test_a_weight_below_zero_is_kept_when_it_is_among_the_best() -> None:
    plan = depths(capacity="0.5")(column([-3.0, -1.0, -4.0, -2.0]), token_info(4))
    assert taken(plan) == [1, 3]
    assert plan.combine_weights.tolist() == [0.0, -1.0, 0.0, -2.0]


@pytest.mark.parametrize(("capacity", "count"), [("0.125", 1), ("0.01", 1), ("0.3", 2), ("0.32", 3), ("1", 8)])
def test_each_sequence_has_its_own_best_and_ties_go_to_the_earlier(capacity: str, count: int) -> None:
    padding = [(7, 0), (6, 0), (0, 2)]
    info = token_info(8, 3, padding=padding)
    tokens = torch.randint(-2, 3, (24, 1), generator=torch.Generator().manual_seed(3)).double()  # many ties
    wanted = []
    for sample in range(3):
        real = [row for row in range(8) if (row, sample) not in padding]
        best = sorted(real, key=lambda row: (-tokens[3 * row + sample].item(), row))[:count]
        wanted += [3 * row + sample for row in best]
    assert taken(depths(capacity=capacity)(tokens, info)) == sorted(wanted)


def test_a_sequence_of_padding_only_and_one_that_is_too_short() -> None:
    padding = [(row, 0) for row in range(8)] + [(row, 1) for row in range(2, 8)]
    plan = depths(capacity="0.5")(column(R * 2), token_info(8, 2, padding=padding))
    assert taken(plan) == [1, 3]  # both tokens that the second sequence has
    losses = [plan.aux_losses["predictor_loss"].share.item(), -sum(column([R[1], R[3]]).sigmoid().log()).item()]
    assert losses[0] == pytest.approx(losses[1])


def test_evaluation_asks_each_token_by_itself_or_takes_the_best() -> None:
    info = token_info(8, train=False, padding=[(2, 0)])
    plan = depths()(column(R), info)
    assert taken(plan) == [0, 3, 6, 7]  # above zero; zero itself is not, nor is padding
    assert not plan.aux_losses
    assert taken(depths(inference="top_k", capacity="0.25")(column(R), info)) == [3, 7]


def test_what_r_says_is_reported_as_the_entropy_of_a_choice() -> None:
    stats = depths()(column([0.0, 2.0, -2.0]), token_info(3, padding=[(0, 0)])).stats
    sure = torch.tensor(2.0, dtype=torch.float64).sigmoid()
    entropy = -(sure * sure.log() + (1 - sure) * (1 - sure).log())
    assert stats["entropy_sum"].item() == pytest.approx(2 * entropy.item())
    assert stats["confidence_sum"].item() == pytest.approx(2 * sure.item())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 4}, "--num-experts 4: the one expert of mixture_of_depths is the block itself; use 1"),
        ({"router_options": {"predictor_coeff": "0"}}, "use a coefficient above 0 .0.01., or inference=top_k"),
        ({"router_options": {"capacity": "1.5"}}, "capacity=1.5: expected a number above 0 and at most 1"),
        ({"router_options": {"inference": "best"}}, "expected predictor or top_k"),
        ({"ffn_hidden_size": 12}, "--moe-ffn-hidden-size 12 has no effect"),
        ({"routing_group_samples": 2}, "--moe-routing-group-samples 2 has no effect"),
        ({"aux_loss_coeff": 0.01}, "--moe-aux-loss-coeff 0.01 has no effect"),
        ({"expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor 1.0 has no effect"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given = {"num_experts": 1, "router_topk": 1, "router_type": "mixture_of_depths", **fields}
        make_router(MoEConfig(**given), 1)  # type: ignore[arg-type]


def test_the_best_may_be_taken_without_a_predictor() -> None:
    plan = depths(inference="top_k", predictor_coeff="0")(column(R), token_info(8))
    assert not plan.aux_losses
