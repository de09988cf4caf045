"""The update against torch's optimizer and against the formulas, element by element."""

import math

import pytest
import torch

from megatron_moe.optim.adamw import AdamWSegment, adamw_

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6}


def segment(elements: int, dtype: torch.dtype, seed: int) -> AdamWSegment:
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = (torch.randn(elements, dtype=dtype, generator=generator) for _ in range(2))
    return AdamWSegment(weights, gradients, torch.zeros_like(weights), torch.zeros_like(weights))


def update(segments: list[AdamWSegment], step: int, lr: float, weight_decay: float) -> None:
    adamw_(segments, step=step, lr=lr, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=weight_decay)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torchs_own_optimizer(dtype: torch.dtype, weight_decay: float) -> None:
    segments = [segment(size, dtype, size) for size in (1, 7, 1000)]
    twins = [torch.nn.Parameter(one.weights.clone()) for one in segments]
    optimizer = torch.optim.AdamW(
        twins, lr=0.1, betas=(BETA1, BETA2), eps=EPS, weight_decay=weight_decay, foreach=False, fused=False
    )
    for step in range(1, 6):
        for one, twin in zip(segments, twins, strict=True):
            one.gradients.mul_(-0.7)
            twin.grad = one.gradients.clone()
        optimizer.param_groups[0]["lr"] = 0.1 / step
        optimizer.step()
        update(segments, step, 0.1 / step, weight_decay)
    for one, twin in zip(segments, twins, strict=True):
        assert torch.allclose(one.weights, twin.detach(), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_equals_a_loop_over_the_formulas() -> None:
    one = segment(50, torch.float64, seed=1)
    weights, means, squares = one.weights.tolist(), [0.0] * 50, [0.0] * 50
    for step in range(1, 4):
        one.gradients.add_(0.3)
        update([one], step, lr=0.01, weight_decay=0.1)
        for index, gradient in enumerate(one.gradients.tolist()):
            means[index] = BETA1 * means[index] + (1 - BETA1) * gradient
            squares[index] = BETA2 * squares[index] + (1 - BETA2) * gradient**2
            mean, square = means[index] / (1 - BETA1**step), squares[index] / (1 - BETA2**step)
            weights[index] -= 0.01 * 0.1 * weights[index]
            weights[index] -= 0.01 * mean / (math.sqrt(square) + EPS)
    assert one.weights.tolist() == pytest.approx(weights, rel=1e-12)
    assert one.exp_avg.tolist() == pytest.approx(means, rel=1e-12)
    assert one.exp_avg_sq.tolist() == pytest.approx(squares, rel=1e-12)


def test_the_first_update_moves_each_weight_by_the_rate() -> None:
    one = segment(3, torch.float64, seed=2)
    before = one.weights.clone()
    update([one], 1, lr=0.5, weight_decay=0.0)
    assert torch.allclose(one.weights, before - 0.5 * one.gradients.sign(), rtol=0, atol=1e-6)


def test_no_segment_is_no_work() -> None:
    update([], 1, lr=0.1, weight_decay=0.1)


@pytest.mark.gpu
def test_the_gpu_makes_the_same_update() -> None:
    here = [segment(size, torch.float64, size) for size in (7, 1000)]
    there = [
        AdamWSegment(*(tensor.cuda() for tensor in (one.weights, one.gradients, one.exp_avg, one.exp_avg_sq)))
        for one in here
    ]
    for step in (1, 2, 3):
        update(here, step, 0.1, 0.1)
        update(there, step, 0.1, 0.1)
    for one, other in zip(here, there, strict=True):
        assert torch.allclose(one.weights, other.weights.cpu(), rtol=1e-12, atol=1e-12)
