"""What optimizer and clipping need of gradients, whoever keeps them: this rank's own part, flat and wide."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.copies import Copy
from megatron_moe.parallel.layout import ParamLayout
from megatron_moe.parallel.state import ParallelState


class Part(Protocol):
    """What this rank owns of one parameter, somewhere in a flat tensor."""

    @property
    def name(self) -> str: ...

    @property
    def layout(self) -> ParamLayout: ...

    def of(self, shard: Tensor) -> Tensor:
        """The view, flat, of a tensor as long as the shard that belongs to this part."""

    def blocks(self, prefix: str, flat: Tensor, primary: bool, state: ParallelState) -> list[Block]:
        """What `of` returns as rectangles of logical tensors."""


class OwnBucket(Protocol):
    """A flat shard of weights and of their gradients."""

    @property
    def dtype(self) -> torch.dtype:
        """That in which modules compute with the weights."""

    @property
    def segments(self) -> Sequence[Part]: ...

    @property
    def own_weights(self) -> Tensor:
        """(shard_elements,) this rank's part of the weights, a view."""

    @property
    def own_gradients(self) -> Tensor:
        """(shard_elements,) wide, a view; whole sums once they are reduced."""

    def replica_axes(self, layout: ParamLayout) -> tuple[str, ...]:
        """Axes along which every rank owns the same numbers of such a parameter."""

    def speaks_for(self, layout: ParamLayout) -> bool:
        """True on the one rank, among those that own the same numbers, which counts and saves them."""

    def publish(self, master: Tensor) -> None:
        """Let modules see the updated weights, (shard_elements,) wide."""


def copies_of(bucket: OwnBucket, prefix: str, flat: Tensor, state: ParallelState) -> list[Copy]:
    """What of a tensor as long as the bucket's shard other ranks own too, one for each parameter."""
    return [
        Copy(
            prefix + part.name,
            part.of(flat),
            bucket.replica_axes(part.layout),
            partial(part.blocks, prefix, part.of(flat), bucket.speaks_for(part.layout), state),
        )
        for part in bucket.segments
    ]


class Gradients(Protocol):
    """All gradients of this rank's stages."""

    @property
    def state(self) -> ParallelState: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def buckets(self) -> Sequence[OwnBucket]: ...

    def zero_(self) -> None:
        """Start a step: no gradient yet."""

    def layer_done(self, stage: int, layer: int) -> None:
        """Tell that the gradients of this stage's layers from `layer` on are complete."""

    def await_weights(self, layer: int | None) -> None:
        """Wait until the weights of a layer, or those outside of all layers, are those of the last update."""

    def settle(self) -> None:
        """Wait until all of them are."""

    def reduce(self, stage: int | None = None) -> None:
        """Sum the gradients of one stage over the ranks, once they are complete; without a stage, all that is left."""
