"""What the model is fed: named streams of tokens with their labels, masks, positions and packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """One input sequence (decoder, encoder), each tensor (B, S); the same on all tp and pp ranks, uncut over cp."""

    tokens: Tensor  # int64
    labels: Tensor  # int64, the token that follows
    loss_mask: Tensor  # float32, 0 where the label is not learnt
    position_ids: Tensor  # int64
    segments: Tensor  # int32, document number inside the sample, from 0; -1 = padding

    def map(self, change: Callable[[Tensor], Tensor]) -> Stream:
        """The stream with `change` applied to each tensor."""
        return Stream(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Batch:
    """The samples of one microbatch."""

    streams: dict[str, Stream]
    sample_ids: Tensor  # (B,) int64, position in the run's consumed order: the key of every random decision

    @property
    def decoder(self) -> Stream:
        """The stream that is learnt."""
        return self.streams["decoder"]

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
