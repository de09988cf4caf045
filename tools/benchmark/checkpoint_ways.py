"""What tools/benchmark/checkpoint.py times on each rank: the disk itself, our saves and loads, other libraries."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.checkpoint.tensor_file import bytes_of
from megatron_moe.config.optional import require
from megatron_moe.parallel.blocks import Block, flat_range_blocks
from megatron_moe.parallel.layout import LogicalPiece
from megatron_moe.parallel.state import ParallelState

OPTIMIZER = ("master.", "exp_avg.", "exp_avg_sq.")
WRITE_BYTES, READ_BYTES = 32 << 20, 8 << 20


class Share:
    """What one rank holds: its tensors, each part in one stretch of memory."""

    def __init__(self, rank: int, ranks: int, shape: tuple[int, int], num_bytes: int) -> None:
        size = shape[0] * shape[1]
        # a quarter of the bytes are weights, the rest is what the optimizer keeps of them
        count = max(ranks, num_bytes // (1 + len(OPTIMIZER)) // (4 * size) // ranks * ranks)
        random = torch.Generator().manual_seed(rank)
        mine = count // ranks
        self.flat = torch.randn((1 + len(OPTIMIZER)) * mine * size, generator=random)
        weights, *states = self.flat.view(-1, mine * size)
        pieces = [LogicalPiece(f"experts.{index}", shape, (0, 0), shape, None) for index in range(count)]
        own = pieces[rank * mine : (rank + 1) * mine]
        self.parts = {
            "model": [
                Block(piece.name, shape, (0, 0), weights[at * size : (at + 1) * size].view(shape), True)
                for at, piece in enumerate(own)
            ],
            # half a tensor further on each rank but the ends: shards are cut where the bytes are even, not the tensors
            "optim": [
                block
                for prefix, state in zip(OPTIMIZER, states, strict=True)
                for block in _shard(prefix, state, pieces, rank, ranks, size)
            ],
        }
        self.tensors = {
            f"{part}.{block.name}{block.offset}": block.tensor for part, found in self.parts.items() for block in found
        }


def _shard(
    prefix: str, state: Tensor, pieces: Sequence[LogicalPiece], rank: int, ranks: int, size: int
) -> Iterator[Block]:
    """Each rank's range of one state, all tensors end to end, begins half a tensor later than its own tensors do."""
    shift = size // 2 if ranks > 1 else 0
    total = len(pieces) * size
    begin = (rank * state.numel() + shift) % total
    position = 0
    while position < state.numel():
        at, inner = divmod((begin + position) % total, size)
        length = min(size - inner, state.numel() - position)
        yield from flat_range_blocks(pieces[at], prefix, state[position : position + length], inner, True)
        position += length


class Ways:
    """Everything that is timed, on one rank."""

    def __init__(self, share: Share, state: ParallelState, folder: Path) -> None:
        self.share, self.world, self.folder = share, state.world, folder
        self.rank = state.world.rank
        self.bytes = bytes_of(share.flat)
        self.memory = np.ones_like(self.bytes)
        self.steps = itertools.count(1)
        self.kept = self._writer(background=True)
        self.foreground = self._writer(background=False)
        self.with_sha256 = self._writer(background=False, sha256=True)
        self.seconds: dict[str, float] = {}
        self.safe_file = folder / f"safe-{self.rank}.safetensors"
        self.raw_file = folder / f"raw-{self.rank}"
        self.safe = require("safetensors.torch", extra="dev")

    def _writer(self, background: bool, sha256: bool = False) -> CheckpointWriter:
        folder = self.folder / "ours"
        return CheckpointWriter(folder, self.world, None, "benchmark", background=background, sha256=sha256)

    def timed(self, name: str, call: Callable[[], object]) -> None:
        """All ranks begin together; the slowest one counts."""
        _together()
        started = time.perf_counter()
        call()
        self.seconds[name] = time.perf_counter() - started
        _together()

    def round(self, turn: int, peers: bool) -> dict[str, float]:
        """Every way once."""
        self.seconds = {}
        groups = [self.raw, self.copying, self.saves, self.loads] + ([self.peers] if peers else [])
        shift = turn % len(groups)
        for group in groups[shift:] + groups[:shift]:
            group()
        return self.seconds

    def raw(self) -> None:
        self.timed("write raw", self._write_raw)
        _drop(self.raw_file)
        self.timed("read raw", self._read_raw)
        self.raw_file.unlink()

    def _write_raw(self) -> None:
        file = os.open(self.raw_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for start in range(0, len(self.bytes), WRITE_BYTES):
            os.write(file, self.bytes.data[start : start + WRITE_BYTES])
        os.fsync(file)
        os.close(file)

    def _read_raw(self) -> None:
        file = os.open(self.raw_file, os.O_RDONLY)
        for start in range(0, len(self.memory), READ_BYTES):
            os.preadv(file, [self.memory.data[start : start + READ_BYTES]], start)
        os.close(file)

    def copying(self) -> None:
        self.timed("copy", lambda: np.copyto(self.memory, self.bytes))

    def _save(self, writer: CheckpointWriter) -> int:
        step = next(self.steps)
        writer.save(step, self.share.parts, {"step": step}, "{}", {})
        return step

    def _finish(self, writer: CheckpointWriter, step: int) -> None:
        writer.commit_if_ready(block=True)
        if writer.last_step != step:
            raise RuntimeError(f"not saved: {writer.last_error}")

    def saves(self) -> None:
        self.timed("save", lambda: self._finish(self.foreground, self._save(self.foreground)))
        self._forget()
        with without_hashes():
            self.timed("save, no hash", lambda: self._finish(self.foreground, self._save(self.foreground)))
        self._forget()
        self.timed("save, sha256", lambda: self._finish(self.with_sha256, self._save(self.with_sha256)))
        self._forget()
        self._background("stall", self.kept)
        new = self._writer(background=True)
        self._background("first stall", new)
        new.finish()

    def _background(self, stall: str, writer: CheckpointWriter) -> None:
        _together()
        started = time.perf_counter()
        step = self._save(writer)
        self.seconds[stall] = time.perf_counter() - started
        self._finish(writer, step)
        if stall == "stall":
            self.seconds["background"] = time.perf_counter() - started
        self._forget()

    def _forget(self) -> None:
        _together()
        while self.world.is_first and (self.folder / "ours").exists():
            # a writer's last link may still be on its way
            shutil.rmtree(self.folder / "ours", ignore_errors=True)
        _together()

    def loads(self) -> None:
        self._finish(self.foreground, self._save(self.foreground))
        for name, checks in LOADS.items():
            _drop(*(self.folder / "ours").glob("step_*/*"))
            self.timed(name, partial(self._load, **checks))
        self._forget()

    def _load(self, **checks: Any) -> None:
        reader = find_checkpoint(self.folder / "ours", None, self.world, **checks)
        for part, blocks in self.share.parts.items():
            reader.fill_all(blocks, part)

    def peers(self) -> None:
        """Each writes the same bytes and waits for the disk, as a checkpoint must."""
        tensors = self.share.tensors
        save_safe = partial(self.safe.save_file, tensors, self.safe_file)
        self.timed("save safetensors", lambda: _synced(self.safe_file, save_safe))
        _drop(self.safe_file)
        self.timed("load safetensors", lambda: _copied(tensors, self.safe.load_file(self.safe_file)))
        self.safe_file.unlink()
        own = {f"{name}@{self.rank}": tensor for name, tensor in tensors.items()}
        folder = self.folder / "dcp"
        alone = self.world.size == 1
        self.timed("save dcp", lambda: dcp_save(own, checkpoint_id=folder, no_dist=alone))
        _drop(*folder.glob("*"))
        self.timed("load dcp", lambda: dcp_load(own, checkpoint_id=folder, no_dist=alone))
        _together()
        if self.world.is_first:
            shutil.rmtree(folder)
        _together()


LOADS: dict[str, dict[str, Any]] = {
    "load": {"check": "on_read"},
    "load, no hash": {"check": "sizes"},
    "verify": {"check": "xxh3"},
}


def _together() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _drop(*paths: Path) -> None:
    """From the page cache, if the system agrees. Files that are not on the disk yet would stay."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _synced(path: Path, save: Callable[[], object]) -> None:
    save()
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def _copied(targets: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """A model has its memory already: what a library returns must still get there."""
    for name, tensor in found.items():
        targets[name].copy_(tensor)


class _NoHash:
    """Takes bytes and says another digest each time, for equal ones would make the experts twins."""

    _count = itertools.count()

    def __init__(self, _: object = b"", digits: int = 32) -> None:
        self._digits = digits

    def update(self, _: object) -> None:
        return

    def hexdigest(self) -> str:
        return f"{next(self._count):0{self._digits}x}"


@contextmanager
def without_hashes() -> Iterator[None]:
    """Of tensors and files, while a save is written."""
    place = "megatron_moe.checkpoint.write."
    with (
        mock.patch(f"{place}xxhash.xxh3_128_hexdigest", lambda data: _NoHash(data).hexdigest()),
        mock.patch(f"{place}hashlib.sha256", lambda data=b"": _NoHash(data, 64)),
    ):
        yield
