"""What stands between the two products of a feed-forward layer."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def swiglu(inner: Tensor) -> Tensor:
    """inner (..., 2, F): SiLU(gate) · up.  [arXiv:2002.05202]"""
    gate, up = inner.unbind(-2)
    return F.silu(gate) * up


def geglu(inner: Tensor) -> Tensor:
    """inner (..., 2, F): GELU(gate) · up.  [arXiv:2002.05202; ST-MoE, arXiv:2202.08906, section 3.1]"""
    gate, up = inner.unbind(-2)
    return F.gelu(gate) * up


def geglu_tanh(inner: Tensor) -> Tensor:
    """inner (..., 2, F): the same with GELU by tanh.  [T5 v1.1; flaxformer, which trained ST-MoE]"""
    gate, up = inner.unbind(-2)
    return F.gelu(gate, approximate="tanh") * up


def gelu(inner: Tensor) -> Tensor:
    """inner (..., 1, F)."""
    return F.gelu(inner.squeeze(-2))


def relu(inner: Tensor) -> Tensor:
    """inner (..., 1, F).  [Switch, arXiv:2101.03961]"""
    return F.relu(inner.squeeze(-2))


Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, tuple[int, Activation]] = {  # how many inner branches, and what joins them
    "swiglu": (2, swiglu),
    "geglu": (2, geglu),
    "geglu_tanh": (2, geglu_tanh),
    "gelu": (1, gelu),
    "relu": (1, relu),
}


def products_of(name: str) -> int:
    """FLOPs of a feed-forward layer's matrix products for each element of hidden x inner width."""
    branches, _ = ACTIVATIONS[name]
    return 2 * (branches + 1)
