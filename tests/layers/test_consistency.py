"""The divergence of two predictions: worked numbers, an obvious oracle, and the same over a split vocabulary."""

import numpy as np
import pytest
import torch
from moe_rows import NOBODY, tp_state
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.layers.consistency import symmetric_divergence

VOCAB, PADDED = 6, 8


def oracle(first: np.ndarray, second: np.ndarray) -> float:
    """The definition, one token."""
    p, q = (np.exp(logits) / np.exp(logits).sum() for logits in (first, second))
    forth = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    back = sum(b * np.log(b / a) for a, b in zip(p, q, strict=True))
    return float((forth + back) / 2)


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(2, 3, PADDED, generator=generator, dtype=torch.float64) for _ in range(2))


def test_the_worked_example() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    assert symmetric_divergence(p, q, 3, NOBODY).item() == pytest.approx(0.0886, abs=1e-4)


def test_it_is_the_definition_over_the_real_vocabulary() -> None:
    first, second = draw()
    found = symmetric_divergence(first, second, VOCAB, NOBODY)
    for row in range(2):
        for column in range(3):
            a, b = (logits[row, column, :VOCAB].numpy() for logits in (first, second))
            assert found[row, column].item() == pytest.approx(oracle(a, b), rel=1e-12)
    torch.testing.assert_close(found, symmetric_divergence(second, first, VOCAB, NOBODY))
    assert symmetric_divergence(first, first, VOCAB, NOBODY).abs().max() < 1e-15
    assert (found > 0).all()


def test_bfloat16_logits_are_compared_in_float32() -> None:
    first, second = (logits.bfloat16().requires_grad_() for logits in draw())
    found = symmetric_divergence(first, second, VOCAB, NOBODY)
    exact = symmetric_divergence(first.double(), second.double(), VOCAB, NOBODY)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert first.grad is not None and first.grad.dtype == torch.bfloat16


def test_the_gradient_reaches_both_and_is_that_of_finite_differences() -> None:
    first, second = (logits.requires_grad_() for logits in draw())
    assert torch.autograd.gradcheck(lambda a, b: symmetric_divergence(a, b, VOCAB, NOBODY), (first, second))
    assert first.grad is None
    symmetric_divergence(first, second, VOCAB, NOBODY).sum().backward()
    for logits in (first, second):
        assert logits.grad is not None and logits.grad[..., :VOCAB].any() and not logits.grad[..., VOCAB:].any()


def split_over_ranks(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    tp = tp_state(rank, world_size).tp
    first, second = (logits.chunk(world_size, dim=-1)[rank].contiguous().requires_grad_() for logits in draw())
    found = symmetric_divergence(first, second, VOCAB, tp)
    (found * torch.arange(6.0).view(2, 3)).sum().backward()
    assert first.grad is not None
    return found.flatten().tolist(), first.grad.flatten().tolist()


def test_a_vocabulary_split_over_ranks_gives_the_same() -> None:
    answers = run_on_ranks(4, split_over_ranks)
    first, second = (logits.requires_grad_() for logits in draw())
    found = symmetric_divergence(first, second, VOCAB, NOBODY)
    (found * torch.arange(6.0).view(2, 3)).sum().backward()
    grad = torch.cat([torch.tensor(answer[1], dtype=torch.float64).view(2, 3, 2) for answer in answers], dim=-1)
    for values, _ in answers:
        assert values == pytest.approx(found.flatten().tolist(), rel=1e-12)
    torch.testing.assert_close(grad, first.grad)
