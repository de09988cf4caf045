"""Where a product's weight gradient goes: into the parameter's wide sum now, or later when the schedule says so."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

Accumulate = Callable[[Tensor], None]  # adds a weight gradient to the tensor it is given
LayerDone = Callable[[int], None]  # told a layer: there is nothing to come for it and those behind it


class WeightGradients(ABC):
    """Takes the weight gradient of each large product, as a function that adds it to `parameter.main_grad`."""

    @abstractmethod
    def add(self, parameter: Tensor, accumulate: Accumulate) -> None: ...

    @abstractmethod
    def layer_done(self, layer: int) -> None:
        """The backward pass has left this layer, and all behind it."""


class Immediate(WeightGradients):
    """Adds at once.   done: who is told of layers that are done with; None: nobody."""

    def __init__(self, done: LayerDone | None = None) -> None:
        self._done = done

    def add(self, parameter: Tensor, accumulate: Accumulate) -> None:
        _accumulate(parameter, accumulate)

    def layer_done(self, layer: int) -> None:
        if self._done is not None:
            self._done(layer)


class Deferred(WeightGradients):
    """Keeps the work until `run`: the second half of a split backward pass (zero bubble, arXiv:2401.10241)."""

    def __init__(self, done: LayerDone | None = None) -> None:
        self._done = done
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, parameter: Tensor, accumulate: Accumulate) -> None:
        self._waiting.append(partial(_accumulate, parameter, accumulate))

    def layer_done(self, layer: int) -> None:
        if self._done is not None:
            self._waiting.append(partial(self._done, layer))

    def run(self) -> None:
        """All that has come together so far."""
        while self.run_one():
            pass

    def run_one(self) -> bool:
        """The oldest of it; False when there is none."""
        if not self._waiting:
            return False
        self._waiting.popleft()()
        return True


def _accumulate(parameter: Tensor, accumulate: Accumulate) -> None:
    with torch.no_grad():
        accumulate(parameter.main_grad)  # type: ignore[attr-defined]


class _LayerEntrance(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: int, sink: WeightGradients) -> Tensor:
        ctx.layer, ctx.sink = layer, sink
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # autograd runs what was made last first: all of the layer was made after this
        ctx.sink.layer_done(ctx.layer)
        return grad, None, None


def enter_layer(hidden: Tensor, layer: int, sink: WeightGradients | None) -> Tensor:
    """The input of a layer as it is; in the backward pass the sink is told that the layer is done with."""
    if sink is None:
        return hidden
    entered: Tensor = _LayerEntrance.apply(hidden, layer, sink)
    return entered


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
