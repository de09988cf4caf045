"""The project's checkpoints as source and sink of single tensors."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.checkpoint.stream import Piece, StreamedCheckpoint, streamed_checkpoint
from megatron_moe.checkpoint.tensor_file import DTYPES, bytes_of
from megatron_moe.checkpoint.write import RankTable
from megatron_moe.convert.tensors import Shape

PART = "model"
STEP = 0


class CheckpointSource:
    """A TensorSource over the weights of a checkpoint, whatever layout it was saved on."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._stored = reader.tensors.get(PART, {})

    def names(self) -> Sequence[str]:
        """Logical names, without optimizer state."""
        return list(self._stored)

    def shape(self, name: str) -> Shape:
        """From the manifest."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """From the manifest."""
        return DTYPES[self._stored[name].dtype]

    def read(self, name: str) -> Tensor:
        """A whole logical tensor, put together from its slices."""
        return self._reader.logical(name, PART)


class CheckpointSink:
    """A TensorSink that writes step 0 of a checkpoint folder, weights only. Made by `new_checkpoint`.

    Tensors come in the order in which they were announced: the file is hashed as it is written.
    """

    def __init__(self, made: StreamedCheckpoint, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        self._made = made
        self._pieces = [Piece.whole(name, dtype, shape) for name, (shape, dtype) in tensors.items()]
        self._coming = iter(self._pieces)
        self._file = made.file(PART, 0, self._pieces)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; ValueError if it is not the next one that was announced."""
        piece = next(self._coming, None)
        if piece is None or piece != Piece.whole(name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} is not what was announced here")
        self._file.write(piece, iter([bytes_of(tensor.contiguous())]))

    def finish(self, config_json: str, state: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Write the JSON files and the manifest, and make the checkpoint visible by a rename."""
        missing = next(self._coming, None)
        if missing is not None:
            raise ValueError(f"{missing.name} was announced and never came")
        table = RankTable()
        self._file.finish(table)
        texts = {
            "state.json": json.dumps(state, indent=1),
            "config.json": config_json,
            "data.json": json.dumps(data, indent=1),
        }
        self._made.finish([table], texts)


@contextmanager
def new_checkpoint(root: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> Iterator[CheckpointSink]:
    """A checkpoint to fill with these tensors and to `finish`; nothing of it stays after an error.

    ConfigError if `root` has a step 0 already; StorageError if the disk is full or cannot be written.
    """
    run_id = f"import-{uuid.uuid4().hex[:12]}"
    need = sum(prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    with streamed_checkpoint(root, STEP, run_id, mark=f"{run_id}-1", need=need, flag="--save") as made:
        yield CheckpointSink(made, tensors)
