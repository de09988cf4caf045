"""Ranks that share one GPU: gloo moves what is on the host, so everything goes there and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_moe.parallel.communicator import Communicator, Pending


class _Arrival(Pending):
    """What is filled on the host, and copied to where it belongs once it is there."""

    def __init__(self, pending: Pending, host: Tensor, tensor: Tensor) -> None:
        self._pending = pending
        self._host = host
        self._tensor = tensor

    def wait(self) -> None:
        self._pending.wait()
        self._tensor.copy_(self._host)

    def is_over(self) -> bool:
        return self._pending.is_over()


class ThroughHost(Communicator):
    """Another communicator that is only given tensors on the host. Slow; for checks on one card."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor.copy_(self._inner.all_reduce_(tensor.cpu(), op))

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self._inner.all_gather(tensor.cpu(), rows).to(tensor.device)

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self._inner.reduce_scatter(tensor.cpu(), rows).to(tensor.device)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._inner.all_to_all(tensor.cpu(), send, receive).to(tensor.device)

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        return tensor.copy_(self._inner.broadcast_(tensor.cpu(), source))

    def send(self, tensor: Tensor, to: int) -> Pending:
        return self._inner.send(tensor.cpu(), to)

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        host = torch.empty_like(tensor, device="cpu")
        return _Arrival(self._inner.receive_(host, source), host, tensor)

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        host = torch.empty_like(received, device="cpu")
        return _Arrival(self._inner.send_receive_(tensor.cpu(), to, host, source), host, received)

    def barrier(self) -> None:
        self._inner.barrier()
