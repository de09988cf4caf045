"""What the model is fed: named streams of tokens with their labels, masks, positions and packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """A sequence that a model reads, each tensor (B, S); the same on all tp and pp ranks, uncut over cp."""

    tokens: Tensor  # int64
    position_ids: Tensor  # int64
    segments: Tensor  # int32, document number inside the sample, from 0; -1 = padding

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with `change` applied to each tensor."""
        found: dict[str, Any] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            found[field.name] = None if tensor is None else change(tensor)
        return type(self)(**found)


@dataclass(frozen=True)
class Stream(Inputs):
    """A sequence that is learnt."""

    labels: Tensor  # int64, the token that follows
    loss_mask: Tensor  # float32, 0 where the label is not learnt
    prefix: Tensor | None = None  # bool, tokens that all of their document see (prefix LM); None: none


@dataclass(frozen=True)
class Batch:
    """The samples of one microbatch."""

    streams: dict[str, Inputs]  # "decoder", and in an encoder-decoder model "encoder"
    sample_ids: Tensor  # (B,) int64, position in the run's consumed order: the key of every random decision

    @property
    def decoder(self) -> Stream:
        """The stream that is learnt."""
        found = self.streams["decoder"]
        assert isinstance(found, Stream)
        return found

    @property
    def encoder(self) -> Inputs | None:
        """What the encoder reads, where there is one."""
        return self.streams.get("encoder")

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies in the background."""
        return self._map(lambda tensor: tensor.pin_memory())

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start..stop-1 of this batch, as views."""
        return self._map(lambda tensor: tensor[start:stop])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        streams = {name: stream.map(change) for name, stream in self.streams.items()}
        return Batch(streams=streams, sample_ids=change(self.sample_ids))
