"""Balance loss, z-loss and router statistics against loops, worked numbers and finite differences."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from moe_rows import GOLDEN_LOGITS, NOBODY, rows_of, token_info, tp_state
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.losses import (
    BALANCE_CONVENTIONS,
    choice_counts,
    load_balance_loss,
    router_losses,
    router_stats,
    z_loss,
)
from megatron_moe.moe.plan import TokenInfo

GOLDEN = torch.tensor(GOLDEN_LOGITS, dtype=torch.float64)


def slow_balance(scores: np.ndarray, ids: np.ndarray, info: TokenInfo, convention: str) -> float:
    """Σ_groups E · Σ_e f_e · P_e, counted token by token."""
    num_experts, total = scores.shape[1], 0.0
    for group in range(info.num_groups):
        members = [t for t in range(len(scores)) if info.groups[t] == group and not info.is_padding[t]]
        if not members:
            continue
        for expert in range(num_experts):
            count = 0.0
            for t in members:
                chosen = ids[t, :1] if convention == "first_choice" else ids[t]
                count += list(chosen).count(expert)
            if convention == "normalised":
                count /= ids.shape[1]
            mean = sum(scores[t, expert] for t in members) / len(members)
            total += num_experts * count / len(members) * mean
    return total


def balance(scores: Tensor, ids: Tensor, info: TokenInfo, convention: str) -> Tensor:
    return load_balance_loss(scores, ids, info, group_axis=NOBODY, convention=convention)


def test_the_worked_balance_losses_and_z_loss_come_out() -> None:
    info = token_info(6)
    scores = GOLDEN.softmax(dim=1)
    ids = GOLDEN.sort(dim=1, descending=True, stable=True).indices[:, :2]
    found = {name: balance(scores, ids, info, name).item() for name in BALANCE_CONVENTIONS}
    assert found == pytest.approx({"first_choice": 1.5002, "all_choices": 2.6379, "normalised": 1.3189}, abs=1e-4)
    assert z_loss(GOLDEN, info).item() / 6 == pytest.approx(5.4931, abs=1e-4)


def test_the_worked_z_loss_gradient_comes_out() -> None:
    logits = GOLDEN.clone().requires_grad_()
    (z_loss(logits, token_info(6)) / 6).backward()
    assert logits.grad is not None
    # papers print dL/dz of a token's own term, 2 · lse · softmax / T
    expected = 2 / 6 * GOLDEN.logsumexp(1, keepdim=True) * GOLDEN.softmax(1)
    torch.testing.assert_close(logits.grad, expected)
    assert logits.grad[0].tolist() == pytest.approx([0.5238, 0.1927, 0.0709, 0.0261], abs=1e-4)


@pytest.mark.parametrize(("num_experts", "value"), [(4, 1.9218), (8, 4.3241), (64, 17.2963)])
def test_z_loss_of_zero_logits_is_the_squared_log_of_the_experts(num_experts: int, value: float) -> None:
    share = z_loss(torch.zeros(5, num_experts, dtype=torch.float64), token_info(5))
    assert share.item() / 5 == pytest.approx(value, abs=1e-4)


def test_balance_can_be_below_one_but_is_one_when_either_side_is_uniform() -> None:
    info = token_info(10)
    scores = torch.tensor([[0.51, 0.49]] * 6 + [[0.0, 1.0]] * 4, dtype=torch.float64)
    ids = scores.argmax(dim=1, keepdim=True)
    assert balance(scores, ids, info, "first_choice").item() == pytest.approx(0.9224, abs=1e-4)
    even = torch.full((10, 2), 0.5, dtype=torch.float64)
    assert balance(even, ids, info, "first_choice").item() == pytest.approx(1.0)
    half = torch.tensor([0, 1] * 5)[:, None]
    assert balance(scores, half, info, "first_choice").item() == pytest.approx(1.0)


@pytest.mark.parametrize("convention", BALANCE_CONVENTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_balance_loss_equals_the_loops(convention: str, seed: int) -> None:
    torch.manual_seed(seed)
    length, samples, num_experts = (5, 4, 6) if seed % 2 else (3, 5, 2)
    padding = [(length - 1, 0), (length - 2, 0)] + [(p, 1) for p in range(length)]
    info = token_info(length, samples, group_samples=1 + seed // 2, padding=padding)
    scores = torch.randn(length * samples, num_experts, dtype=torch.float64).softmax(dim=1)
    ids = torch.rand(length * samples, num_experts).argsort(dim=1)[:, :2]
    ids[0, 1] = num_experts  # an unused choice
    expected = slow_balance(scores.numpy(), ids.numpy(), info, convention)
    assert balance(scores, ids, info, convention).item() == pytest.approx(expected, rel=1e-12)


def test_balance_gradient_flows_through_the_scores_as_finite_differences_say() -> None:
    info = token_info(4, 2, padding=[(3, 1)])
    logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    ids = logits.detach().argmax(dim=1, keepdim=True)
    assert torch.autograd.gradcheck(lambda z: balance(z.softmax(dim=1), ids, info, "first_choice"), logits)
    assert torch.autograd.gradcheck(lambda z: z_loss(z, info), logits)


def test_padding_changes_no_loss_and_no_statistic() -> None:
    whole = token_info(4, 1)
    padded = token_info(6, 1, padding=[(4, 0), (5, 0)])
    logits = torch.randn(6, 5, dtype=torch.float64)
    ids = logits.sort(dim=1, descending=True).indices[:, :2]
    for convention in BALANCE_CONVENTIONS:
        a = balance(logits[:4].softmax(1), ids[:4], whole, convention)
        b = balance(logits.softmax(1), ids, padded, convention)
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(z_loss(logits[:4], whole), z_loss(logits, padded))
    torch.testing.assert_close(router_stats(logits[:4].softmax(1), whole), router_stats(logits.softmax(1), padded))


def test_a_group_of_padding_only_adds_nothing() -> None:
    info = token_info(3, 2, padding=[(0, 1), (1, 1), (2, 1)])
    scores = torch.full((6, 2), 0.5, dtype=torch.float64)
    ids = torch.zeros(6, 1, dtype=torch.int64)
    assert balance(scores, ids, info, "first_choice").item() == pytest.approx(1.0)


def test_statistics_are_sums_over_tokens() -> None:
    scores = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    stats = router_stats(scores, token_info(2))
    assert stats["entropy_sum"].item() == pytest.approx(math.log(2))
    assert stats["confidence_sum"].item() == 1.5
    assert not any(value.requires_grad for value in stats.values())


def test_losses_are_those_that_the_config_weighs_and_only_in_training() -> None:
    logits = GOLDEN
    ids = logits.argmax(dim=1, keepdim=True)

    def names(train: bool, **fields: float) -> dict[str, tuple[float, str]]:
        config = MoEConfig(num_experts=4, **fields)  # type: ignore[arg-type]
        info = token_info(6, train=train)
        found = router_losses(logits, logits.softmax(1), ids, info, config=config, group_axis=NOBODY)
        return {name: (loss.weight, loss.per) for name, loss in found.items()}

    assert names(True) == {}
    assert names(True, aux_loss_coeff=0.01) == {"load_balance_loss": (0.01, "group")}
    assert names(True, z_loss_coeff=0.001) == {"z_loss": (0.001, "token")}
    assert names(False, z_loss_coeff=0.001, aux_loss_coeff=0.01) == {}


def shares_on_rank(rank: int, world_size: int) -> tuple[dict[str, float], list[int], list[Any], list[Any]]:
    """Losses, rows and gradients of a rank with an uneven part of two groups; the last rank has none of it."""
    axis = tp_state(rank, world_size).tp_cp
    info, logits, ids = split_case()
    cuts = [0, 11, 12, 20, 20]
    rows = torch.arange(20)[cuts[rank] : cuts[rank + 1]]
    mine, z = rows_of(info, rows), logits[rows].requires_grad_()
    losses = {
        name: load_balance_loss(z.softmax(1), ids[rows], mine, group_axis=axis, convention=name)
        for name in BALANCE_CONVENTIONS
    }
    losses["z"] = z_loss(z, mine)
    torch.stack(list(losses.values())).sum().backward()
    counts = choice_counts(ids[rows], mine, num_experts=4, group_axis=axis)
    assert z.grad is not None
    return {name: loss.item() for name, loss in losses.items()}, rows.tolist(), z.grad.tolist(), counts.tolist()


def split_case() -> tuple[TokenInfo, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 4, dtype=torch.float64, generator=generator)
    info = token_info(5, 4, group_samples=2, padding=[(4, 3), (3, 3), (0, 0)])
    return info, logits, logits.sort(dim=1, descending=True).indices[:, :2]


def test_the_shares_of_uneven_and_empty_ranks_add_up_to_the_whole() -> None:
    info, logits, ids = split_case()
    logits.requires_grad_()
    whole = {name: balance(logits.softmax(1), ids, info, name) for name in BALANCE_CONVENTIONS}
    whole["z"] = z_loss(logits, info)
    torch.stack(list(whole.values())).sum().backward()
    answers = run_on_ranks(4, shares_on_rank)
    for name, loss in whole.items():
        assert sum(losses[name] for losses, *_ in answers) == pytest.approx(loss.item(), rel=1e-12)
    gradient = torch.zeros_like(logits)
    for _, rows, grad, counts in answers:
        if rows:
            gradient[rows] = torch.tensor(grad, dtype=torch.float64)
        assert counts == choice_counts(ids, info, num_experts=4, group_axis=NOBODY).tolist()
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-15)
