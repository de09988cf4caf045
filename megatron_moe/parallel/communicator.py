"""How the ranks of one axis talk: nobody else (Identity) or a process group (Torch); recording.py only counts.

The only file that calls torch.distributed; FSDP does for itself, over a mesh that is made here. Rows are dim 0. No
method changes its argument unless its name says so.
What begins with `start_` returns at once; computing goes on until somebody waits for the tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_moe.parallel.arrival import Arrival, Flying, Landed, as_it_is

# torch 2.13 renamed these two; 2.11 has the old names only
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(ABC):
    """A transfer under way."""

    @abstractmethod
    def wait(self) -> None: ...

    @abstractmethod
    def is_over(self) -> bool:
        """True when it is known, without waiting, that the tensor is not needed any more (gloo knows after a wait)."""


class Done(Pending):
    """A transfer that needed no time."""

    def wait(self) -> None:
        return

    def is_over(self) -> bool:
        return True


class Communicator(ABC):
    """Collectives along one axis; every rank of the axis calls the same ones in the same order."""

    @abstractmethod
    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce in place over the ranks; op is "sum", "max" or "min"."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        """Concatenate the ranks' rows; rows[r] is what rank r brings."""

    @abstractmethod
    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        """Sum over the ranks and keep the own rows; rows[r] is what rank r keeps."""

    @abstractmethod
    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send send[r] rows to rank r, in order; returns receive[r] rows from each r, in order."""

    def start_all_reduce_(self, tensor: Tensor, op: str = "sum") -> Arrival:
        """As all_reduce_; the argument must be left alone until it has arrived."""
        return Landed(self.all_reduce_(tensor, op))

    def start_all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        """As all_gather."""
        return Landed(self.all_gather(tensor, rows))

    def start_all_gather_(self, whole: Tensor, own: Tensor) -> Arrival:
        """Fill `whole` in place with the ranks' equal shares, of which `own` is this rank's and may be a view of it."""
        shares = [own.shape[0]] * (whole.shape[0] // own.shape[0])
        return Landed(whole.copy_(self.all_gather(own, shares)))

    def start_reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        """As reduce_scatter; the argument must not be changed until it has arrived."""
        return Landed(self.reduce_scatter(tensor, rows))

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        """As all_to_all."""
        return Landed(self.all_to_all(tensor, send, receive))

    @abstractmethod
    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Fill in place from the rank `source` of this axis."""

    @abstractmethod
    def send(self, tensor: Tensor, to: int) -> Pending:
        """Start sending to rank `to` of this axis; keep the tensor until the wait is over."""

    @abstractmethod
    def receive_(self, tensor: Tensor, source: int) -> Pending:
        """Start filling `tensor` from rank `source` of this axis."""

    @abstractmethod
    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        """Start sending `tensor` to rank `to` and filling `received` from rank `source`, both at once.

        On a ring every rank sends and receives: begun one after the other, all could wait for a receiver.
        """

    @abstractmethod
    def barrier(self) -> None: ...


class Starting(Communicator):
    """One that starts its collectives: doing one at once is to start it and to wait. A subclass has all `start_`."""

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return self.start_all_reduce_(tensor, op).wait()

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self.start_all_gather(tensor, rows).wait()

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self.start_reduce_scatter(tensor, rows).wait()

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self.start_all_to_all(tensor, send, receive).wait()


class Identity(Communicator):
    """One rank alone."""

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return tensor

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return tensor

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return tensor

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        return tensor

    def send(self, tensor: Tensor, to: int) -> Pending:
        raise RuntimeError("a rank alone has nobody to send to")

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        raise RuntimeError("a rank alone has nobody to receive from")

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        raise RuntimeError("a rank alone has nobody to send to and to receive from")

    def barrier(self) -> None:
        return


class _Work(Pending):
    """Handles of torch.distributed, with the tensors they must keep alive."""

    def __init__(self, works: Sequence[dist.Work], *tensors: Tensor) -> None:
        self._works = works
        self._tensors = tensors

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def is_over(self) -> bool:
        return all(work.is_completed() for work in self._works)


class Torch(Starting):
    """A process group of torch.distributed (gloo or NCCL)."""

    OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

    def __init__(self, group: dist.ProcessGroup, ranks: tuple[int, ...], rank: int) -> None:
        self._group = group
        self._ranks = ranks
        self._rank = rank

    def start_all_reduce_(self, tensor: Tensor, op: str = "sum") -> Arrival:
        work = dist.all_reduce(tensor, self.OPS[op], group=self._group, async_op=True)
        return Flying(work, tensor, then=as_it_is)

    def start_all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        most = max(rows)
        mine = tensor.contiguous()
        if min(rows) < most:
            # neither gloo nor NCCL gathers uneven shares: pad to the largest, then cut
            mine = tensor.new_zeros((most, *tensor.shape[1:]))
            mine[: tensor.shape[0]] = tensor
        out = tensor.new_empty((most * len(rows), *tensor.shape[1:]))
        work = _ALL_GATHER(out, mine, group=self._group, async_op=True)
        return Flying(work, out, mine, then=partial(_without_padding, rows=rows, most=most))

    def start_all_gather_(self, whole: Tensor, own: Tensor) -> Arrival:
        # NCCL gathers in place; gloo copies the own share onto itself, which nothing promises
        mine = own if own.is_cuda else own.clone()
        work = _ALL_GATHER(whole, mine, group=self._group, async_op=True)
        return Flying(work, whole, mine, then=as_it_is)

    def start_reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        own = rows[self._rank]
        if min(rows) == max(rows):
            mine, whole = tensor.new_empty((own, *tensor.shape[1:])), tensor.contiguous()
            work = _REDUCE_SCATTER(mine, whole, group=self._group, async_op=True)
            return Flying(work, mine, whole, then=as_it_is)
        whole = tensor.clone(memory_format=torch.contiguous_format)
        start = sum(rows[: self._rank])
        work = dist.all_reduce(whole, group=self._group, async_op=True)
        return Flying(work, whole, then=lambda summed: summed[start : start + own].clone())

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        out, mine = tensor.new_empty((sum(receive), *tensor.shape[1:])), tensor.contiguous()
        work = dist.all_to_all_single(out, mine, list(receive), list(send), group=self._group, async_op=True)
        return Flying(work, out, mine, then=as_it_is)

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        dist.broadcast(tensor, self._ranks[source], group=self._group)
        return tensor

    def send(self, tensor: Tensor, to: int) -> Pending:
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._ranks[to], group=self._group)
        return _Work([work], tensor) if work is not None else Done()

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        work = dist.irecv(tensor, self._ranks[source], group=self._group)
        return _Work([work], tensor) if work is not None else Done()

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        tensor = tensor.contiguous()
        sending = dist.P2POp(dist.isend, tensor, self._ranks[to], self._group)
        receiving = dist.P2POp(dist.irecv, received, self._ranks[source], self._group)
        # one launch under NCCL, where a send may wait for its receiver
        return _Work(dist.batch_isend_irecv([sending, receiving]), tensor, received)

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """The same ranks as a mesh of one dimension, for libraries that ask for one; no new process group."""
        return DeviceMesh.from_group(self._group, device.type)


def _without_padding(gathered: Tensor, rows: Sequence[int], most: int) -> Tensor:
    if min(rows) == most:
        return gathered
    return torch.cat([gathered[r * most : r * most + n] for r, n in enumerate(rows)])
