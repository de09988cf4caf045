"""Where a product's weight gradient goes: into the parameter's wide sum now, or later when the schedule says so."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

Accumulate = Callable[[Tensor], None]  # adds a weight gradient to the tensor it is given


class WeightGradients(ABC):
    """Takes the weight gradient of each large product, as a function that adds it to `parameter.main_grad`."""

    @abstractmethod
    def add(self, parameter: Tensor, accumulate: Accumulate) -> None: ...


class Immediate(WeightGradients):
    """Adds at once."""

    def add(self, parameter: Tensor, accumulate: Accumulate) -> None:
        with torch.no_grad():
            accumulate(parameter.main_grad)  # type: ignore[attr-defined]


class Deferred(WeightGradients):
    """Keeps the work until `run`: the second half of a split backward pass (zero bubble, arXiv:2401.10241)."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Accumulate]] = []

    def add(self, parameter: Tensor, accumulate: Accumulate) -> None:
        self._waiting.append((parameter, accumulate))

    def run(self) -> None:
        with torch.no_grad():
            for parameter, accumulate in self._waiting:
                accumulate(parameter.main_grad)  # type: ignore[attr-defined]
        self._waiting.clear()


def collect_small_gradients(module: nn.Module) -> None:
    """Move what autograd leaves in `.grad` (norms, routers, anything that took no sink) into `main_grad`, widened.

    Parameters without one have their gradients reduced by somebody else.
    """

    def move(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
            parameter.grad = None

    for parameter in module.parameters():
        if hasattr(parameter, "main_grad"):
            parameter.register_post_accumulate_grad_hook(move)
