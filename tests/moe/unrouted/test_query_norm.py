"""Batch normalisation over a routing group: torch's own, on real tokens only, on any split of the group."""

import pytest
import torch
from moe_rows import NOBODY, rows_of, token_info, tp_state
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.moe.unrouted.query_norm import BatchNorm

WIDTH = 3


def queries() -> Tensor:
    return 2.0 + 3.0 * torch.randn(15, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


INFO = token_info(5, 3, group_samples=2, padding=[(4, 0), (4, 2), (3, 2), (2, 2), (1, 2), (0, 2)])


def by_torch(rows: Tensor) -> Tensor:
    """Group 0's real tokens, as torch normalises them."""
    real = (INFO.groups == 0) & ~INFO.is_padding
    return torch.nn.functional.batch_norm(rows[real], None, None, training=True)


def test_a_group_is_normalised_as_torch_does_it_without_padding() -> None:
    norm, rows = BatchNorm(WIDTH, NOBODY, torch.float64), queries()
    rows[INFO.is_padding] = 1e6
    answer, _ = norm(rows, INFO)
    torch.testing.assert_close(answer[(INFO.groups == 0) & ~INFO.is_padding], by_torch(rows))
    assert answer.isfinite().all()


def test_running_statistics_are_means_over_groups_that_have_tokens() -> None:
    norm, rows = BatchNorm(WIDTH, NOBODY, torch.float64), queries()
    _, first = norm(rows, INFO)
    _, second = norm(2.0 * rows, INFO)
    # the second group is padding only: two groups in all
    own = {name: first[name] + second[name] for name in first}
    assert float(own["query_groups"]) == 2
    norm.remember(own)
    real = rows[(INFO.groups == 0) & ~INFO.is_padding]
    torch.testing.assert_close(norm.running_mean, 0.1 * 1.5 * real.mean(dim=0))
    torch.testing.assert_close(norm.running_variance, 0.9 + 0.1 * 2.5 * real.var(dim=0, correction=0))
    answer, stats = norm(rows, token_info(5, 3, train=False))
    assert not stats
    torch.testing.assert_close(answer, (rows - norm.running_mean) / (norm.running_variance + 1e-5).sqrt())


def test_a_step_without_tokens_forgets_nothing() -> None:
    norm = BatchNorm(WIDTH, NOBODY, torch.float64)
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    norm.remember({"query_mean_sum": zero, "query_variance_sum": zero, "query_groups": torch.zeros(())})
    assert norm.running_variance.tolist() == [1.0] * WIDTH


def normalised_on_rank(rank: int, world_size: int) -> tuple[list[int], list[list[float]], list[list[float]], float]:
    norm = BatchNorm(WIDTH, tp_state(rank, world_size).tp_cp, torch.float64)
    mine = torch.arange(15)[torch.arange(15) % 4 == rank].flip(0)
    rows = queries()[mine].requires_grad_()
    answer, stats = norm(rows, rows_of(INFO, mine))
    (answer * torch.sin(mine.double())[:, None]).sum().backward()
    assert rows.grad is not None
    return mine.tolist(), answer.tolist(), rows.grad.tolist(), float(stats["query_mean_sum"].sum())


def test_a_split_group_is_normalised_alike_gradient_included() -> None:
    whole = BatchNorm(WIDTH, NOBODY, torch.float64)
    rows = queries().requires_grad_()
    answer, stats = whole(rows, INFO)
    (answer * torch.sin(torch.arange(15).double())[:, None]).sum().backward()
    assert rows.grad is not None
    ranks = run_on_ranks(4, normalised_on_rank)
    for places, answers, gradients, _ in ranks:
        for place, mine, gradient in zip(places, answers, gradients, strict=True):
            assert mine == pytest.approx(answer[place].tolist())
            assert gradient == pytest.approx(rows.grad[place].tolist())
    assert sum(rank[3] for rank in ranks) == pytest.approx(float(stats["query_mean_sum"].sum()))
