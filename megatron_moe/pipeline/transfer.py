"""Sending a stage's named tensors to its neighbours: activations one way, gradients the other."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_moe.parallel.communicator import Pending
from megatron_moe.parallel.state import Axis

Edge = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # declared shape and dtype of every tensor of an edge


class Transfer:
    """One rank's two channels along the pipeline; sends run on while the stage computes."""

    def __init__(self, forward: Axis, backward: Axis, device: torch.device) -> None:
        self._forward = forward
        self._backward = backward
        self._device = device
        self._sending: list[Pending] = []

    def send_forward(self, tensors: Mapping[str, Tensor], edge: Edge) -> None:
        """To the next stage, in the order of the edge."""
        self._send(self._forward, self._forward.rank + 1, tensors, edge)

    def send_backward(self, gradients: Mapping[str, Tensor], edge: Edge) -> None:
        """To the stage before."""
        self._send(self._backward, self._backward.rank - 1, gradients, edge)

    def receive_forward(self, edge: Edge) -> dict[str, Tensor]:
        """From the stage before."""
        return self._receive(self._forward, self._forward.rank - 1, edge)

    def receive_backward(self, edge: Edge) -> dict[str, Tensor]:
        """Gradients from the next stage."""
        return self._receive(self._backward, self._backward.rank + 1, edge)

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for pending in self._sending:
            pending.wait()
        self._sending.clear()

    def _send(self, axis: Axis, to: int, tensors: Mapping[str, Tensor], edge: Edge) -> None:
        for name, (shape, dtype) in edge.items():
            tensor = tensors[name].detach()
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise RuntimeError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; the edge declares {shape} {dtype}")
            if tensor.numel():
                self._sending.append(axis.comm.send(tensor, to))

    def _receive(self, axis: Axis, source: int, edge: Edge) -> dict[str, Tensor]:
        found = {name: torch.empty(shape, dtype=dtype, device=self._device) for name, (shape, dtype) in edge.items()}
        waiting = [axis.comm.receive_(tensor, source) for tensor in found.values() if tensor.numel()]
        for pending in waiting:
            pending.wait()
        return found
