"""A bucket of weight gradients: flat, wide, of parameters that are reduced alike. Sharded, each rank owns a part:

    | embedding | gap | norm | w1 ...             | w2 ...   | gap |
    |------ shard of rank 0 ------|------ shard of rank 1 ---------|
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.blocks import Block, flat_range_blocks
from megatron_moe.parallel.layout import ParamLayout, layout_of, logical_pieces
from megatron_moe.parallel.state import ParallelState

NamedParameter = tuple[str, nn.Parameter]

# elements; parameters and shards begin on 32-byte boundaries even in bf16: grouped products and vector loads need 16
ALIGNMENT = 16


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients, moments and master weights of a model in `dtype` are kept in."""
    return torch.promote_types(dtype, torch.float32)


def layer_of(name: str) -> int | None:
    """The global number of the layer that a parameter is part of; None: of no layer (embedding, head, last norm)."""
    found = re.match(r"layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def aligned(elements: int) -> int:
    """That many elements, and the gap behind them."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Segment:
    """What this rank owns of one parameter: elements start.. of its row-major order, at `place` in the shard."""

    name: str
    layout: ParamLayout
    start: int
    place: slice

    def of(self, shard: Tensor) -> Tensor:
        """The view of a tensor as long as the shard that belongs to this segment."""
        return shard[self.place]

    def blocks(self, prefix: str, flat: Tensor, primary: bool, state: ParallelState) -> list[Block]:
        """Cut what `of` returns into rectangles; in a stack of experts, each expert's part for itself."""
        found: list[Block] = []
        begin, stop = 0, self.start + flat.numel()
        for piece in logical_pieces(self.name, self.layout, state):
            end = begin + prod(piece.shape)
            first, last = max(begin, self.start), min(end, stop)
            if first < last:
                part = flat[first - self.start : last - self.start]
                found += flat_range_blocks(piece, prefix, part, first - begin, primary)
            begin = end
        return found


class Bucket:
    """Parameters of one stage that are reduced alike, in one flat storage, and the shard of it that this rank owns.

    weights: flat, model dtype, the storage of the parameters.  gradients: flat, wide, seen as `parameter.main_grad`.
    The ranks of an axis in `sum_over` must have the same place on the `reduce_over` axis.
    """

    def __init__(
        self, stage: int, members: Sequence[NamedParameter], state: ParallelState, sharded: bool, *, shared: bool
    ) -> None:
        """shared: several stages of this rank use the members."""
        self.name, first = members[0]
        self.stage = stage
        self.axis = state.axis(layout_of(first).reduce_over)
        self.sum_axes = [state.axis(name) for name in layout_of(first).sum_over]
        self.sharded = sharded
        self.layers = frozenset(layer_of(name) for name, _ in members)
        self._state = state
        self._summing: Arrival | None = None
        self._gathering: Arrival | None = None
        # an axis that leaves the stage has to wait until other stages are done too
        self.is_local = not shared and all(set(axis.ranks) <= set(state.stage.ranks) for axis in self.sum_axes)
        starts, length = _places(members)
        parts, mine = (self.axis.size, self.axis.rank) if sharded else (1, 0)
        self.shard_elements = aligned(-(-length // parts))
        self._own = slice(mine * self.shard_elements, (mine + 1) * self.shard_elements)
        self.weights = torch.zeros(parts * self.shard_elements, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.weights, dtype=wide_dtype(first.dtype))
        for (_, parameter), start in zip(members, starts, strict=True):
            self._adopt(parameter, start)
        self.segments = self._segments(members, starts)

    def _adopt(self, parameter: nn.Parameter, start: int) -> None:
        """Move a parameter into the flat storage and give it its gradient there."""
        place = slice(start, start + parameter.numel())
        self.weights[place].view(parameter.shape).copy_(parameter.data)
        parameter.data = self.weights[place].view(parameter.shape)
        parameter.main_grad = self.gradients[place].view(parameter.shape)  # type: ignore[attr-defined]

    def _segments(self, members: Sequence[NamedParameter], starts: Sequence[int]) -> tuple[Segment, ...]:
        own, found = self._own, []
        for (name, parameter), begin in zip(members, starts, strict=True):
            start, stop = max(begin, own.start), min(begin + parameter.numel(), own.stop)
            if start < stop:
                place = slice(start - own.start, stop - own.start)
                found.append(Segment(name, layout_of(parameter), start - begin, place))
        return tuple(found)

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.weights.dtype

    @property
    def own_weights(self) -> Tensor:
        """(shard_elements,) this rank's part of the weights, a view."""
        return self.weights[self._own]

    @property
    def own_gradients(self) -> Tensor:
        """(shard_elements,) this rank's part of the gradients, a view; whole sums once the bucket is reduced."""
        return self.gradients[self._own]

    def replica_axes(self, layout: ParamLayout) -> tuple[str, ...]:
        """Axes along which every rank owns the same numbers of such a parameter."""
        return layout.replica_axes if self.sharded else (*layout.replica_axes, layout.reduce_over)

    def speaks_for(self, layout: ParamLayout) -> bool:
        """True on the one rank, among those that own the same numbers, which counts and saves them."""
        return all(self._state.axis(name).is_first for name in self.replica_axes(layout))

    def is_done_with(self, layer: int) -> bool:
        """Whether all gradients are complete once those of all layers from this one on are."""
        return all(own is not None and own >= layer for own in self.layers)

    def reduce(self) -> None:
        """Sum the gradients over all ranks that hold a part of them."""
        self.start_reduce()
        self.finish_reduce()

    def start_reduce(self) -> None:
        """Begin with the sum over the replicas."""
        comm = self.axis.comm
        if self.sharded:
            self._summing = comm.start_reduce_scatter(self.gradients, self._rows())
        else:
            self._summing = comm.start_all_reduce_(self.gradients)

    def finish_reduce(self) -> None:
        """Wait for it, then sum the shard alone over the other axes.

        So there is less to send, and the last sum gives all copies of a tied or replicated weight the same bits.
        """
        assert self._summing is not None
        summed, self._summing = self._summing.wait(), None
        if summed is not self.gradients:  # a rank alone gets its argument back, and so do all that are not sharded
            self.own_gradients.copy_(summed)
        for axis in self.sum_axes:
            axis.comm.all_reduce_(self.own_gradients)

    def publish(self, master: Tensor) -> None:
        """Begin to bring this rank's updated weights, (shard_elements,) wide, into the parameters of all ranks."""
        if master.dtype != self.dtype:
            self.own_weights.copy_(master)
        self.start_gather()

    def gather_weights(self) -> None:
        """Fill all weights, and so the parameters, from the shards of their owners."""
        self.start_gather()
        self.finish_gather()

    def start_gather(self) -> None:
        if self.sharded:
            self._gathering = self.axis.comm.start_all_gather_(self.weights, self.own_weights)

    def finish_gather(self) -> None:
        """Wait until the weights are whole; returns at once when they are."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def _rows(self) -> list[int]:
        return [self.shard_elements] * self.axis.size


def _places(members: Sequence[NamedParameter]) -> tuple[list[int], int]:
    """Where each parameter begins in the flat storage, and how long that is."""
    starts, end = [], 0
    for _, parameter in members:
        starts.append(end)
        end = aligned(end + parameter.numel())
    return starts, end
