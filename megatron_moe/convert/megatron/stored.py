"""Tensors that lie in several pieces, each a rectangle of the whole; read in slices along their first dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_moe.checkpoint.tensor_file import DTYPES
from megatron_moe.config.errors import CheckpointError
from megatron_moe.convert.hf_folder import FLOAT_WORDS
from megatron_moe.convert.tensors import Shape


class PlainFiles:
    """The safetensors files of a child process, opened when they are asked for."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def shape(self, path: Path, key: str) -> Shape:
        """From the header."""
        return tuple(self._slice(path, key).get_shape())

    def dtype(self, path: Path, key: str) -> torch.dtype:
        """From the header; CheckpointError for types that no float weight has."""
        word = self._slice(path, key).get_dtype()
        if word not in FLOAT_WORDS:
            raise CheckpointError(
                f"{key} has the type {word}, but only {', '.join(FLOAT_WORDS)} can be imported; "
                f"save the checkpoint without packed weights."
            )
        return DTYPES[word]

    def read(self, path: Path, key: str) -> Tensor:
        """A whole tensor."""
        return self._slice(path, key)[...]  # type: ignore[no-any-return]

    def _slice(self, path: Path, key: str) -> Any:
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_slice(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); is the disk full?") from error


@dataclass(frozen=True)
class Piece:
    """start .. start + shape[dim] along `dim` of a tensor in a plain file, which lie at `offset` of the whole."""

    path: Path
    key: str
    offset: Shape
    shape: Shape
    dim: int = 0
    start: int = 0


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint under its own name."""

    name: str
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self, lead: Shape, files: PlainFiles) -> Tensor:
        """The slice at `lead`, indices of the first dimensions.

        CheckpointError unless each of its elements is in exactly one piece.
        """
        out = torch.empty(self.shape[len(lead) :], dtype=self.dtype)
        chosen = [piece for piece in self.pieces if _holds(piece, lead)]
        boxes = [(piece.offset[len(lead) :], piece.shape[len(lead) :]) for piece in chosen]
        for first, second in _pairs(boxes):
            if _overlap(first, second):
                raise CheckpointError(f"tensor {self.name} {list(lead)}: two pieces hold the same numbers.")
        if sum(prod(shape) for _, shape in boxes) != out.numel():
            raise CheckpointError(f"tensor {self.name} {list(lead)}: pieces are missing, so it is not whole.")
        for piece, (offset, shape) in zip(chosen, boxes, strict=True):
            value = files.read(piece.path, piece.key)
            value = value.narrow(piece.dim, piece.start, piece.shape[piece.dim])
            inner = tuple(index - base for index, base in zip(lead, piece.offset, strict=False))
            place = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
            out[place] = value[inner]
        return out


def _holds(piece: Piece, lead: Shape) -> bool:
    spans = zip(lead, piece.offset, piece.shape, strict=False)
    return all(base <= index < base + size for index, base, size in spans)


Box = tuple[Shape, Shape]


def _pairs(boxes: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    for number, first in enumerate(boxes):
        for second in boxes[number + 1 :]:
            yield first, second


def _overlap(first: Box, second: Box) -> bool:
    sides = zip(*first, *second, strict=True)
    return all(a < b + width_b and b < a + width_a for a, width_a, b, width_b in sides)


def distributed(tensors: Any, path: Path, files: PlainFiles) -> dict[str, Stored]:
    """The tensors of a torch_dist checkpoint, as opener.py tells of them; CheckpointError for pieces outside."""
    found = {}
    for name, told in tensors.items():
        shape = tuple(told["shape"])
        pieces = tuple(
            Piece(path, key, tuple(offset), files.shape(path, key)) for key, offset in told["pieces"]
        )
        for piece in pieces:
            if len(piece.offset) != len(shape) or len(piece.shape) != len(shape) or any(
                base + size > whole for base, size, whole in zip(piece.offset, piece.shape, shape, strict=True)
            ):
                raise CheckpointError(f"tensor {name} {list(shape)}: a piece of it lies outside.")
        if not pieces:
            raise CheckpointError(f"tensor {name} {list(shape)} has no pieces.")
        types = {files.dtype(path, piece.key) for piece in pieces}
        if len(types) > 1:
            raise CheckpointError(f"tensor {name}: its pieces have different types ({', '.join(map(str, types))}).")
        found[name] = Stored(name, shape, types.pop(), pieces)
    return found
