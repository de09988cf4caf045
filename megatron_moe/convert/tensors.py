"""Where tensors come from and where they go, one at a time; nothing here knows a file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.config.errors import CheckpointError

Shape = tuple[int, ...]

# the project's word and the word of config.json
PROJECT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIBRARY_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class TensorSource(Protocol):
    """Named tensors of which only the one that is asked for comes into memory."""

    def names(self) -> Sequence[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, without reading it."""

    def read(self, name: str) -> Tensor:
        """A whole tensor, in its own type, on the CPU."""


class TensorSink(Protocol):
    """Takes named tensors one after the other; keeps none of them."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Store a whole tensor under a name that was announced when the sink was made."""


def shapes_of(source: TensorSource) -> dict[str, Shape]:
    """Name to shape of everything that a source has."""
    return {name: source.shape(name) for name in source.names()}


def check_same_tensors(where: str, found: Mapping[str, Shape], needed: Mapping[str, Shape]) -> None:
    """CheckpointError for the first tensor that is missing, extra or wrongly shaped; `where` names the side."""
    for name, shape in needed.items():
        if name not in found:
            raise CheckpointError(
                f"{where} lacks the tensor {name} {list(shape)} that its config asks for "
                f"({len(found)} tensors found, {len(needed)} needed); check that weights and config belong together."
            )
    for name in found:
        if name not in needed:
            raise CheckpointError(
                f"{where} has a tensor {name} {list(found[name])} that its config has no place for "
                f"({len(found)} tensors found, {len(needed)} needed); check that weights and config belong together."
            )
    for name, shape in needed.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"{where}: tensor {name} has the shape {list(found[name])}, but the config asks for {list(shape)}; "
                f"check that weights and config belong together."
            )
