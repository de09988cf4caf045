"""The project's checkpoints as source and sink of single tensors.

`CheckpointWriter` of the training loop copies all of a rank's tensors to host memory first; here they pass one by one
into the same files, with the same manifest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_moe.checkpoint.commit import assemble, commit
from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.checkpoint.manifest import StoredFile
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.checkpoint.rotate import discard, point_latest, step_folder
from megatron_moe.checkpoint.storage import Storage, append, describe_failure, make_dirs, write_file
from megatron_moe.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, bytes_of, header_bytes
from megatron_moe.checkpoint.write import HeldSlice, RankTable
from megatron_moe.config.errors import ConfigError, StorageError
from megatron_moe.convert.tensors import Shape

PART = "model"
FILE = "model-r00000.safetensors"
STEP = 0

log = logging.getLogger(__name__)


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

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]], run_id: str) -> None:
        self.folder = folder
        self._storage = Storage()
        self._run_id = run_id
        self._tensors = dict(tensors)
        self._coming = iter(tensors)
        entries = [(name, DTYPE_NAMES[dtype], shape) for name, (shape, dtype) in tensors.items()]
        self._head = header_bytes(entries, {"run_id": run_id, "step": str(STEP), "rank": "0"})
        self._digest = hashlib.sha256(self._head)
        self._position = len(self._head)
        self._table = RankTable()
        self._file = self._storage.create(folder / FILE)
        append(self._storage, self._file, memoryview(self._head))

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; ValueError if it is not the next one that was announced."""
        shape, dtype = self._tensors[name]
        if next(self._coming, None) != name or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} is not what was announced here")
        data = bytes_of(tensor.contiguous()).data
        append(self._storage, self._file, data)
        self._digest.update(data)
        whole = Rectangle((0,) * len(shape), shape)
        digest = xxhash.xxh3_128_hexdigest(data)
        word = DTYPE_NAMES[dtype]
        self._table.slices.append(
            HeldSlice(PART, name, word, shape, whole, True, digest, FILE, self._position, len(data))
        )
        self._position += len(data)

    def finish(self, config_json: str, state: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Write the JSON files and the manifest, and make the checkpoint visible by a rename."""
        missing = next(self._coming, None)
        if missing is not None:
            raise ValueError(f"{missing} was announced and never came")
        self._storage.fsync(self._file)
        self.close()
        header = xxhash.xxh3_128_hexdigest(self._head)
        self._table.files[FILE] = StoredFile(self._position, self._digest.hexdigest(), len(self._head), header)
        texts = {
            "state.json": json.dumps(state, indent=1).encode(),
            "config.json": config_json.encode(),
            "data.json": json.dumps(data, indent=1).encode(),
        }
        for name, text in texts.items():
            write_file(self._storage, self.folder / name, memoryview(text))
            self._table.files[name] = StoredFile(len(text), hashlib.sha256(text).hexdigest())
        root = self.folder.parent
        manifest = assemble([self._table], self._run_id, STEP, _code_version())
        commit(self._storage, manifest, self.folder, step_folder(root, STEP))
        point_latest(self._storage, root, STEP, self._run_id)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._file >= 0:
            self._storage.close(self._file)
            self._file = -1


@contextmanager
def new_checkpoint(root: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> Iterator[CheckpointSink]:
    """A checkpoint to fill with these tensors and to `finish`; nothing of it stays after an error.

    ConfigError if `root` has a step 0 already; StorageError if the disk is full or cannot be written.
    """
    final = step_folder(root, STEP)
    if os.path.lexists(final):
        raise ConfigError(f"--save {root} has {final.name} already, which is not overwritten; give another directory.")
    run_id = f"import-{uuid.uuid4().hex[:12]}"
    folder = root / f"{final.name}.tmp-{run_id}-1"
    need = sum(prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    storage = Storage()
    sink = None
    try:
        make_dirs(storage, root)
        storage.make_dir(folder)
        sink = CheckpointSink(folder, tensors, run_id)
        yield sink
    except OSError as error:
        raise StorageError(describe_failure(error, folder, need)) from error
    finally:
        if sink is not None:
            sink.close()
        if folder.exists():
            discard(storage, folder)


def _code_version() -> str:
    try:
        return importlib.metadata.version("megatron_moe")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
