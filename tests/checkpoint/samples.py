"""Small checkpoints for tests, and disks that remember or fail."""

import errno
import os
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.load import CheckpointReader, find_checkpoint
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.checkpoint.storage import Storage
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.state import Axis, ParallelState

ALONE = ParallelState.alone().world
CONFIG = '{"model": {"num_layers": 2}}'


def whole_block(name: str, tensor: Tensor) -> Block:
    return Block(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, primary=True)


def sample_parts(seed: int) -> dict[str, list[Block]]:
    """A tiny model and its optimizer: four dtypes, a scalar, an empty tensor, one tensor in two blocks."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 6, generator=random)
    halves = [Block("w", (4, 6), (0, start), weight[:, start : start + 3], primary=True) for start in (0, 3)]
    model = [
        whole_block("norm", torch.randn(5, generator=random).to(torch.bfloat16)),
        *halves,
        whole_block("mask", torch.tensor([True, False, True])),
        whole_block("nothing", torch.empty(0, 3)),
    ]
    optim = [
        whole_block("step", torch.tensor(seed, dtype=torch.int64)),
        whole_block("exp_avg.w", torch.randn(4, 6, generator=random, dtype=torch.float64)),
    ]
    return {"model": model, "optim": optim}


def emptied(parts: dict[str, list[Block]]) -> dict[str, list[Block]]:
    """The same blocks with other numbers, to be filled."""
    return {
        part: [Block(b.name, b.global_shape, b.offset, torch.full_like(b.tensor, 77), b.primary) for b in blocks]
        for part, blocks in parts.items()
    }


class HastyStorage(Storage):
    """Does not wait for the disk: for tests that cut no power."""

    def fsync(self, file: int) -> None:
        return

    def sync_dir(self, path: Path) -> None:
        return


def save_sample(
    root: Path, step: int, run_id: str = "run", keep: int | None = None, storage: Storage | None = None
) -> CheckpointWriter:
    writer = CheckpointWriter(root, ALONE, keep, run_id, storage or HastyStorage(), background=False)
    save_step(writer, step)
    return writer


def save_step(writer: CheckpointWriter, step: int) -> None:
    """The numbers of a sample depend on its step only."""
    writer.save(step, sample_parts(step), {"samples": step * 8}, CONFIG, {"corpus": "abc"})


def assert_holds_sample(reader: CheckpointReader) -> None:
    """Everything in it is what `save_step` wrote for its step."""
    expected = sample_parts(reader.step)
    target = emptied(expected)
    for part, blocks in target.items():
        reader.fill(blocks, part)
        for found, block in zip(blocks, expected[part], strict=True):
            assert torch.equal(found.tensor, block.tensor), (part, block.name)
    assert reader.state == {"samples": reader.step * 8}
    assert reader.config_json == CONFIG
    assert reader.data == {"corpus": "abc"}


def newest(root: Path, world: Axis = ALONE, **options: Any) -> CheckpointReader:
    return find_checkpoint(root, None, world, **options)


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(prod(shape), dtype=dtype).reshape(shape)


@dataclass(frozen=True)
class Operation:
    """One change to the disk, with paths relative to the watched folder."""

    kind: str
    path: str
    other: str = ""
    data: bytes = b""
    done_ns: int = 0  # on the clock that all processes share


class RecordingStorage(HastyStorage):
    """Does everything, and remembers it."""

    def __init__(self, root: Path) -> None:
        self.operations: list[Operation] = []
        self._root = root
        self._open: dict[int, str] = {}

    def _note(self, kind: str, path: Path | str, other: str = "", data: bytes = b"") -> None:
        name = os.path.relpath(path, self._root) if isinstance(path, Path) else path
        self.operations.append(Operation(kind, name, other, data, time.monotonic_ns()))

    def make_dir(self, path: Path) -> None:
        super().make_dir(path)
        self._note("make_dir", path)

    def create(self, path: Path) -> int:
        file = super().create(path)
        self._note("create", path)
        self._open[file] = os.path.relpath(path, self._root)
        return file

    def write(self, file: int, data: memoryview) -> int:
        taken = super().write(file, data[:300])  # short writes, so that there are many states
        self._note("write", self._open[file], data=bytes(data[:taken]))
        return taken

    def fsync(self, file: int) -> None:
        super().fsync(file)
        self._note("fsync", self._open[file])

    def sync_dir(self, path: Path) -> None:
        super().sync_dir(path)
        self._note("sync_dir", path)

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self._note("rename", old, os.path.relpath(new, self._root))

    def symlink(self, target: str, link: Path) -> None:
        super().symlink(target, link)
        self._note("symlink", link, target)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._note("unlink", path)

    def remove_dir(self, path: Path) -> None:
        super().remove_dir(path)
        self._note("remove_dir", path)


class FailingStorage(HastyStorage):
    """Fails from its `first`-th call on, `times` calls long (None: for ever)."""

    def __init__(self, first: int, times: int | None, error: int = errno.ENOSPC) -> None:
        self.calls = 0
        self.failures = 0
        self._first = first
        self._times = times
        self._error = error

    def _call(self) -> None:
        self.calls += 1
        if self.calls >= self._first and (self._times is None or self.failures < self._times):
            self.failures += 1
            raise OSError(self._error, os.strerror(self._error))

    def make_dir(self, path: Path) -> None:
        self._call()
        super().make_dir(path)

    def create(self, path: Path) -> int:
        self._call()
        return super().create(path)

    def write(self, file: int, data: memoryview) -> int:
        self._call()
        return super().write(file, data)

    def fsync(self, file: int) -> None:
        self._call()
        super().fsync(file)

    def sync_dir(self, path: Path) -> None:
        self._call()
        super().sync_dir(path)

    def rename(self, old: Path, new: Path) -> None:
        self._call()
        super().rename(old, new)

    def symlink(self, target: str, link: Path) -> None:
        self._call()
        super().symlink(target, link)

    def unlink(self, path: Path) -> None:
        self._call()
        super().unlink(path)

    def remove_dir(self, path: Path) -> None:
        self._call()
        super().remove_dir(path)


class ShortStorage(Storage):
    """Says that it took all bytes of a file whose name holds `part`, and loses the last one."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._lossy: set[int] = set()

    def create(self, path: Path) -> int:
        file = super().create(path)
        self._lossy.discard(file)
        if self._part in path.name:
            self._lossy.add(file)
        return file

    def write(self, file: int, data: memoryview) -> int:
        if file in self._lossy:
            super().write(file, data[:-1])
            return len(data)
        return super().write(file, data)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
