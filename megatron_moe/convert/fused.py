"""Weights that transformers 5.x wrote under its in-memory names, shown under the names that every version reads.

model.layers.3.mlp.experts.gate_up_proj (E, 2F, H)  rows 0..F are gate, F..2F up
model.layers.3.mlp.experts.down_proj    (E, H, F)
model.layers.3.mlp.gate.weight          (E, H)      Mixtral's router, elsewhere block_sparse_moe.gate
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import CheckpointError
from megatron_moe.convert.family import ExpertNames
from megatron_moe.convert.hf_folder import HfFolder
from megatron_moe.convert.tensors import Shape

FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: a whole stored tensor, or rows start..stop of one expert's slice."""

    stored: str
    shape: Shape
    expert: int | None = None
    start: int = 0


class Unfused:
    """A TensorSource over a folder in which fused experts appear one by one; the others as they are."""

    def __init__(self, folder: HfFolder, names: ExpertNames) -> None:
        self._folder = folder
        self._places: dict[str, _Place] = {}
        for stored in folder.names():
            for name, place in _places(stored, folder.shape(stored), names):
                if name in self._places:
                    other = self._places[name].stored
                    raise CheckpointError(f"{folder.folder}: {name} is there twice, in {other} and {stored}.")
                self._places[name] = place

    def names(self) -> Sequence[str]:
        """Names of the unfused tensors."""
        return list(self._places)

    def shape(self, name: str) -> Shape:
        """The shape of one expert's matrix, or of a whole tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._folder.dtype(self._places[name].stored)

    def read(self, name: str) -> Tensor:
        """One expert's matrix, or a whole tensor."""
        place = self._places[name]
        if place.expert is None:
            return self._folder.read(place.stored)
        return self._folder.read_rows(place.stored, place.expert, place.start, place.start + place.shape[0])

    def without(self, name: str) -> None:
        """Forget a tensor that repeats another."""
        del self._places[name]


def _places(stored: str, shape: Shape, names: ExpertNames) -> Iterator[tuple[str, _Place]]:
    match = FUSED.fullmatch(stored)
    if match is None:
        yield stored, _Place(stored, shape)
        return
    layer, kind = int(match[1]), match[2]
    if kind == "gate.weight":
        yield names.router.format(layer=layer), _Place(stored, shape)
        return
    parts = (names.gate, names.up) if kind.endswith("gate_up_proj") else (names.down,)
    if len(shape) != 3 or shape[1] % len(parts):
        raise CheckpointError(f"tensor {stored} has the shape {list(shape)}, which is no stack of experts.")
    rows = shape[1] // len(parts)
    for expert in range(shape[0]):
        for index, part in enumerate(parts):
            yield part.format(layer=layer, expert=expert), _Place(stored, (rows, shape[2]), expert, index * rows)
