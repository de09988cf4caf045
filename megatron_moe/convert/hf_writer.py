"""Writing a Hugging Face model folder: safetensors by hand, one tensor in memory at a time, published by one rename.

A file is 8 bytes of header length, the header (JSON: name, type, shape, range of bytes) and the numbers. All shapes are
known beforehand, so the shards are planned first and each tensor is then written at its place, in any order.
"""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_moe.checkpoint.tensor_file import DTYPE_NAMES, bytes_of, header_bytes
from megatron_moe.config.errors import ConfigError, StorageError
from megatron_moe.config.whole_file import sync_folder, write_whole
from megatron_moe.convert.hf_folder import INDEX, SINGLE
from megatron_moe.convert.tensors import Shape

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

log = logging.getLogger(__name__)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "2GiB"; ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size {text}: expected a size such as 5GB, 500MB or 2GiB.")
    return size


@dataclass(frozen=True)
class Shard:
    """One file: its name, its first bytes, and for each tensor its shape and the byte at which it begins."""

    file: str
    header: bytes
    places: dict[str, tuple[Shape, int]]
    size: int  # bytes of the numbers


def plan_shards(shapes: Mapping[str, Shape], dtype: torch.dtype, max_bytes: int) -> list[Shard]:
    """Fill files in the order of the model, at most `max_bytes` of numbers each; a larger tensor has its own file."""
    groups: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    count = len(groups)
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    files = [SINGLE] if count == 1 else files
    return [_shard(file, group, dtype) for file, group in zip(files, groups, strict=True)]


def _shard(file: str, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Shard:
    """Tensors lie in the file by name, as the library writes them."""
    word = DTYPE_NAMES[dtype]
    header = header_bytes([(name, word, shapes[name]) for name in sorted(shapes)], {"format": "pt"})
    places: dict[str, tuple[Shape, int]] = {}
    end = len(header)
    for name in sorted(shapes):
        places[name] = (shapes[name], end)
        end += prod(shapes[name]) * dtype.itemsize
    return Shard(file, header, places, end - len(header))


class FolderWriter:
    """A TensorSink that writes the planned shards into a directory; `close` writes the index."""

    def __init__(
        self, directory: Path, shapes: Mapping[str, Shape], *, dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        self._directory = directory
        self._dtype = dtype
        self._shards = plan_shards(shapes, dtype, max_shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.places}
        self._left = {shard.file: set(shard.places) for shard in self._shards}
        self._open: dict[str, BinaryIO] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor at its place; its shard is closed once it is whole."""
        shard = self._shard_of[name]
        shape, begin = shard.places[name]
        if tuple(tensor.shape) != shape or tensor.dtype != self._dtype:
            raise ValueError(f"{name}: planned {shape} {self._dtype}, given {tuple(tensor.shape)} {tensor.dtype}")
        self._left[shard.file].remove(name)
        file = self._file(shard)
        file.seek(begin)
        file.write(bytes_of(tensor.contiguous()).data)
        if not self._left[shard.file]:
            self._finish(shard)

    def close(self) -> None:
        """Write the index where there are several shards; ValueError if a planned tensor never came."""
        left = [name for names in self._left.values() for name in names]
        if left:
            raise ValueError(f"{len(left)} planned tensors were never written, first {min(left)}")
        if len(self._shards) > 1:
            write_json(self._directory / INDEX, self._index())

    def abandon(self) -> None:
        """Close what is open after a failure."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _index(self) -> dict[str, Any]:
        parameters = sum(prod(shape) for shard in self._shards for shape, _ in shard.places.values())
        return {
            "metadata": {"total_parameters": parameters, "total_size": sum(shard.size for shard in self._shards)},
            "weight_map": {name: self._shard_of[name].file for name in sorted(self._shard_of)},
        }

    def _file(self, shard: Shard) -> BinaryIO:
        if shard.file not in self._open:
            self._open[shard.file] = (self._directory / shard.file).open("wb")
            self._open[shard.file].write(shard.header)
        return self._open[shard.file]

    def _finish(self, shard: Shard) -> None:
        with self._open.pop(shard.file) as file:
            file.flush()
            os.fsync(file.fileno())
        log.info("wrote %s: %d tensors, %.3f GB", shard.file, len(shard.places), shard.size / 1e9)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON as people read it, on disk when this returns."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` at the end and vanishes after any error.

    Locked meanwhile: what a killed writer left of the same target is removed, what another is filling is not.
    ConfigError if target exists; StorageError if the disk is full or cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"--output {target} exists already and is not overwritten; remove it, or give another name.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        work = Path(tempfile.mkdtemp(prefix=_work_prefix(target), dir=target.parent))
        lock = _lock(work)
    except OSError as error:
        raise StorageError(f"cannot write to {target.parent} ({error}); check the path and its rights.") from error
    try:
        yield work
        _publish(work, target)
    except OSError as error:
        raise StorageError(
            f"writing {target} failed ({error}); nothing is left of it, make room and try again."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _work_prefix(target: Path) -> str:
    return f".{target.name}.tmp-"


def _sweep(target: Path) -> None:
    """Remove what killed writers left: the lock of a process ends with it."""
    for left in target.parent.glob(f"{glob.escape(_work_prefix(target))}*"):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A handle that holds the folder until it is closed; None while another holds it, or where nothing can be held."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _publish(work: Path, target: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    work.chmod(0o777 & ~mask)
    sync_folder(work)
    work.rename(target)
    sync_folder(target.parent)
