"""Activations against their formulas, number by number."""

import math
from collections.abc import Callable

import pytest
import torch

from megatron_moe.ops.activation import ACTIVATIONS


def silu(value: float) -> float:
    return value / (1.0 + math.exp(-value))


def gelu(value: float) -> float:
    return value * 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))  # the exact one, not the tanh approximation


def gelu_by_tanh(value: float) -> float:
    return value * 0.5 * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))


FORMULAS: dict[str, Callable[..., float]] = {
    "swiglu": lambda gate, up: silu(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "geglu_tanh": lambda gate, up: gelu_by_tanh(gate) * up,
    "gelu": gelu,
    "relu": lambda value: max(0.0, value),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_number_follows_the_formula(name: str) -> None:
    branches, activation = ACTIVATIONS[name]
    inner = torch.randn(4, 3, branches, 5, dtype=torch.float64) * 3
    found = activation(inner)
    assert found.shape == (4, 3, 5)
    wanted = [FORMULAS[name](*column) for column in inner.transpose(-1, -2).reshape(-1, branches).tolist()]
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient(name: str) -> None:
    branches, activation = ACTIVATIONS[name]
    inner = torch.randn(2, branches, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(activation, inner)


def test_gate_comes_first() -> None:
    gate_open, up_open = torch.tensor([[30.0], [2.0]]), torch.tensor([[-1e9], [2.0]])
    for name in ("swiglu", "geglu", "geglu_tanh"):
        assert float(ACTIVATIONS[name][1](gate_open)) == 60.0
        assert float(ACTIVATIONS[name][1](up_open)) == 0.0
