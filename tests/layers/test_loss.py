"""The vocabulary-parallel cross-entropy against torch's on the whole, unpadded logits."""

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.layers.loss import vocabulary_cross_entropy
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState

TP1 = ParallelState.alone().tp
S, B, PADDED = 4, 3, 12


def problem(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with padding columns that would win, labels, and what weighs each loss."""
    torch.manual_seed(vocab_size)
    logits = torch.randn(S, B, PADDED, dtype=torch.float64) * 4
    logits[..., vocab_size:] += 50.0
    return logits, torch.randint(0, vocab_size, (S, B)), torch.randn(S, B, dtype=torch.float64)


def oracle(logits: Tensor, labels: Tensor, weights: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their weighted sum, zero in the padding columns."""
    logits = logits.clone().requires_grad_()
    losses = F.cross_entropy(logits[..., :vocab_size].flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    return losses.detach(), gradient


@pytest.mark.parametrize("vocab_size", [12, 11, 7, 1])
def test_one_rank_agrees_with_torch(vocab_size: int) -> None:
    logits, labels, weights = problem(vocab_size)
    before = logits.clone()
    logits.requires_grad_()
    losses = vocabulary_cross_entropy(logits, labels, vocab_size, TP1)
    wanted, gradient = oracle(before, labels, weights, vocab_size)
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-12)
    (losses * weights).sum().backward()
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-12, atol=1e-12)
    assert torch.equal(logits.detach(), before)


def on_rank(rank: int, world_size: int, vocab_size: int) -> None:
    tp = ParallelState.distributed(Grid(world_size, tp=world_size)).tp
    logits, labels, weights = problem(vocab_size)
    wanted, gradient = oracle(logits, labels, weights, vocab_size)
    mine = slice(rank * PADDED // world_size, (rank + 1) * PADDED // world_size)
    local = logits[..., mine].clone().requires_grad_()
    losses = vocabulary_cross_entropy(local, labels, vocab_size, tp)
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-12)
    (losses * weights).sum().backward()
    torch.testing.assert_close(local.grad, gradient[..., mine], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocab_size", [12, 9, 6, 4])
def test_two_ranks_agree_with_torch_even_when_one_holds_only_padding(vocab_size: int) -> None:
    run_on_ranks(2, on_rank, vocab_size)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = vocabulary_cross_entropy(logits, torch.tensor([[1]]), 3, TP1)
    loss.sum().backward()
    assert loss.tolist() == [[2e4]]
    assert logits.grad is not None and logits.grad.tolist() == [[[1.0, -1.0, 0.0]]]


def test_narrow_logits_give_a_wide_loss_and_a_narrow_gradient() -> None:
    logits = torch.randn(S, B, PADDED).bfloat16().requires_grad_()
    labels = torch.randint(0, PADDED, (S, B))
    losses = vocabulary_cross_entropy(logits, labels, PADDED, TP1)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.flatten(), F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    )
    losses.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
