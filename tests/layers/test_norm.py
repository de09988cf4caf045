"""Norms against numpy, and the one that is split over tp against the whole."""

import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.layers.norm import Norm, ProjectionNorm
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of
from megatron_moe.parallel.state import ParallelState
from tests.layers.contexts import make

ALONE = ParallelState.alone()
EPSILON = 1e-3  # large, so that a wrong place for it shows


def norm(kind: str, dtype: torch.dtype = torch.float64) -> Norm:
    module = make(Norm(6, kind, EPSILON, partial=False, dtype=dtype), ALONE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(6))
    return module


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_agrees_with_numpy(kind: str) -> None:
    module, hidden = norm(kind), torch.randn(4, 2, 6, dtype=torch.float64)
    values, weight = hidden.numpy(), module.weight.detach().numpy()
    if kind == "RMSNorm":
        wanted = values / np.sqrt((values**2).mean(-1, keepdims=True) + EPSILON) * weight
    else:
        centred = values - values.mean(-1, keepdims=True)
        wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * weight
        wanted = wanted + module.bias.detach().numpy()
    np.testing.assert_allclose(module(hidden).detach().numpy(), wanted, rtol=1e-12)
    assert torch.autograd.gradcheck(module, hidden.requires_grad_())


def test_starts_as_the_identity_scale_without_weight_decay() -> None:
    module = make(Norm(6, "LayerNorm", EPSILON, partial=True, dtype=torch.float32), ALONE)
    assert module.weight.tolist() == [1.0] * 6 and module.bias.tolist() == [0.0] * 6
    for parameter in module.parameters():
        assert layout_of(parameter).sum_over == ("tp",)
        assert not layout_of(parameter).decay
    assert layout_of(norm("RMSNorm").weight).sum_over == ()


def test_bfloat16_is_normalised_in_float32() -> None:
    hidden = (torch.randn(3, 1, 6) * 1e3).bfloat16()
    module, wide = norm("RMSNorm", torch.bfloat16), norm("RMSNorm", torch.float32)
    with torch.no_grad():
        wide.weight.copy_(module.weight)
    found = module(hidden)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wide(hidden.float()), rtol=2e-2, atol=1e-2)


def projection_oracle(heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    mean = heads.square().mean(dim=(-3, -2, -1), keepdim=True)
    return heads / (mean + EPSILON).sqrt() * weight


def on_rank(rank: int, world_size: int) -> None:
    state = ALONE if world_size == 1 else ParallelState.distributed(Grid(world_size, tp=world_size))
    torch.manual_seed(0)
    heads, probe = torch.randn(2, 3, 2, 4, 3, 5, dtype=torch.float64)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    whole = heads.clone().requires_grad_()
    wanted = projection_oracle(whole, weight)
    wanted.backward(probe)

    mine = slice(4 // world_size * rank, 4 // world_size * (rank + 1))
    module = make(ProjectionNorm((4, 3, 5), EPSILON, state.tp, torch.float64), state)
    with torch.no_grad():
        module.weight.copy_(weight[mine])
    local = heads[:, :, mine].clone().requires_grad_()
    found = module(local)
    found.backward(probe[:, :, mine])
    torch.testing.assert_close(found, wanted[:, :, mine], rtol=1e-12, atol=1e-12)
    assert whole.grad is not None and weight.grad is not None
    torch.testing.assert_close(local.grad, whole.grad[:, :, mine], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.weight.grad, weight.grad[mine], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_projection_is_normalised_over_the_heads_of_all_ranks(world_size: int) -> None:
    run_on_ranks(world_size, on_rank)
