"""Sending a stage's named tensors to its neighbours: activations one way, gradients the other.

The ranks are a ring: with several rounds of stages the last rank hands on to the first. A rank alone hands its tensors
to itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.parallel.communicator import Pending
from megatron_moe.parallel.state import Axis, ParallelState

Edge = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # declared shape and dtype of every tensor of an edge


@dataclass(frozen=True)
class Crossing:
    """One microbatch between two stages, on its way on or back."""

    stage: int  # the later one of the two
    microbatch: int


class Transfer:
    """One rank's channels around the pipeline; sends run on while the stage computes."""

    def __init__(self, state: ParallelState, device: torch.device) -> None:
        self._onward = (state.pp, state.pp_wrap)
        self._backward = (state.pp_back, state.pp_wrap_back)
        self._device = device
        self._sending: list[Pending] = []
        self._own: dict[tuple[Crossing, str], dict[str, Tensor]] = {}  # what this rank hands to itself

    def send_forward(self, tensors: Mapping[str, Tensor], edge: Edge, crossing: Crossing) -> None:
        """To the next stage, in the order of the edge."""
        if self._alone:
            self._own[crossing, "onward"] = _declared(tensors, edge)
            return
        axis, wrap = self._onward
        self._send(wrap if axis.is_last else axis, (axis.rank + 1) % axis.size, _declared(tensors, edge))

    def send_backward(self, gradients: Mapping[str, Tensor], edge: Edge, crossing: Crossing) -> None:
        """To the stage before."""
        if self._alone:
            self._own[crossing, "back"] = _declared(gradients, edge)
            return
        axis, wrap = self._backward
        self._send(wrap if axis.is_first else axis, (axis.rank - 1) % axis.size, _declared(gradients, edge))

    def receive_forward(self, edge: Edge, crossing: Crossing) -> dict[str, Tensor]:
        """From the stage before."""
        if self._alone:
            return self._own.pop((crossing, "onward"))
        axis, wrap = self._onward
        return self._receive(wrap if axis.is_first else axis, (axis.rank - 1) % axis.size, edge)

    def receive_backward(self, edge: Edge, crossing: Crossing) -> dict[str, Tensor]:
        """Gradients from the next stage."""
        if self._alone:
            return self._own.pop((crossing, "back"))
        axis, wrap = self._backward
        return self._receive(wrap if axis.is_last else axis, (axis.rank + 1) % axis.size, edge)

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for pending in self._sending:
            pending.wait()
        self._sending.clear()

    @property
    def _alone(self) -> bool:
        return self._onward[0].size == 1

    def _send(self, axis: Axis, to: int, tensors: Mapping[str, Tensor]) -> None:
        # what has left need not stay in memory until the end of the step
        self._sending = [pending for pending in self._sending if not pending.is_over()]
        self._sending += [axis.comm.send(tensor, to) for tensor in tensors.values() if tensor.numel()]

    def _receive(self, axis: Axis, source: int, edge: Edge) -> dict[str, Tensor]:
        found = {name: torch.empty(shape, dtype=dtype, device=self._device) for name, (shape, dtype) in edge.items()}
        waiting = [axis.comm.receive_(tensor, source) for tensor in found.values() if tensor.numel()]
        for pending in waiting:
            pending.wait()
        return found


def _declared(tensors: Mapping[str, Tensor], edge: Edge) -> dict[str, Tensor]:
    """The tensors of the edge, cut off from how they were made. Raises RuntimeError for one that is another."""
    found = {}
    for name, (shape, dtype) in edge.items():
        tensor = tensors[name].detach()
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise RuntimeError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; the edge declares {shape} {dtype}")
        found[name] = tensor
    return found
