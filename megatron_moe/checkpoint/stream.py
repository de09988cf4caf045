"""A checkpoint written piece by piece, with little in memory: for converters and commands, on one process.

`CheckpointWriter` of the training loop copies all of a rank's tensors to host memory first; here they pass through into
the same files, with the same manifest and the same commit.
"""

import hashlib
import importlib.metadata
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from megatron_moe.checkpoint.commit import assemble, commit
from megatron_moe.checkpoint.manifest import Manifest, StoredFile
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.checkpoint.rotate import discard, left_overs, point_latest, step_folder, stored_steps
from megatron_moe.checkpoint.snapshot import HostBlock
from megatron_moe.checkpoint.storage import Storage, append, describe_failure, make_dirs, write_file
from megatron_moe.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, Bytes, header_bytes
from megatron_moe.checkpoint.write import HeldSlice, RankTable
from megatron_moe.config.errors import ConfigError, StorageError


def code_version() -> str:
    """Of the package that writes."""
    try:
        return importlib.metadata.version("megatron_moe")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor that a file is going to hold. dtype: safetensors' name."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    rectangle: Rectangle

    @classmethod
    def whole(cls, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> "Piece":
        return cls(name, DTYPE_NAMES[dtype], shape, Rectangle.whole(shape))

    @property
    def num_bytes(self) -> int:
        return self.rectangle.volume * DTYPES[self.dtype].itemsize


class StreamedFile:
    """One file of one part. Its pieces come in the order in which they were announced, each in runs of bytes, and are
    hashed on their way; a piece of no bytes is in the table only.
    """

    def __init__(
        self,
        storage: Storage,
        folder: Path,
        part: str,
        rank: int,
        pieces: Sequence[Piece],
        origin: tuple[str, int],
        sha256: bool,
    ) -> None:
        """origin: run id and step, hashed with the header: the file fits no other checkpoint.  sha256: of all of it."""
        self.name = f"{part}-r{rank:05d}.safetensors"
        self._storage = storage
        self._part = part
        entries = [(_key(piece), piece.dtype, piece.rectangle.shape) for piece in pieces if piece.num_bytes]
        metadata = {"run_id": origin[0], "step": str(origin[1]), "rank": str(rank)}
        self._head = header_bytes(entries, metadata)
        self._whole = hashlib.sha256(self._head) if sha256 else None
        self._position = len(self._head)
        self._slices: list[HeldSlice] = []
        self._file = storage.create(folder / self.name)
        append(storage, self._file, memoryview(self._head))

    def write(self, piece: Piece, runs: Iterator[Bytes]) -> None:
        """Append the bytes of the next piece."""
        digest, start = xxhash.xxh3_128(), self._position
        for run in runs:
            append(self._storage, self._file, run.data)
            if self._whole:
                self._whole.update(run.data)
            digest.update(run.data)
            self._position += len(run)
        if self._position - start != piece.num_bytes:
            raise ValueError(f"{piece.name} {piece.rectangle} is announced with {piece.num_bytes:,} bytes")
        file = self.name if piece.num_bytes else ""
        at = (piece.name, piece.dtype, piece.global_shape, piece.rectangle)
        self._slices.append(HeldSlice(self._part, *at, True, digest.hexdigest(), file, start, piece.num_bytes))

    def finish(self, table: RankTable) -> None:
        """Wait for the disk, and enter the file and its slices into the rank's table."""
        self._storage.fsync(self._file)
        self.close()
        header = xxhash.xxh3_128_hexdigest(self._head)
        whole = self._whole.hexdigest() if self._whole else ""
        table.files[self.name] = StoredFile(self._position, whole, len(self._head), header)
        table.slices.extend(self._slices)

    def close(self) -> None:
        """A second time does nothing."""
        if self._file >= 0:
            self._storage.close(self._file)
            self._file = -1


def held_nothing(part: str, piece: Piece) -> HeldSlice:
    """The entry of a piece of no bytes, for which there is no file."""
    at = (piece.name, piece.dtype, piece.global_shape, piece.rectangle)
    return HeldSlice(part, *at, True, xxhash.xxh3_128_hexdigest(b""))


def _key(piece: Piece) -> str:
    return HostBlock(piece.name, piece.dtype, piece.global_shape, piece.rectangle, 0).key


class StreamedCheckpoint:
    """A folder that becomes the checkpoint of a step by `finish`. Made by `streamed_checkpoint`."""

    def __init__(self, storage: Storage, folder: Path, run_id: str, step: int, sha256: bool) -> None:
        self.folder = folder
        self._sha256 = sha256
        self._storage = storage
        self._run_id = run_id
        self._step = step
        self._open: list[StreamedFile] = []

    def file(self, part: str, rank: int, pieces: Sequence[Piece]) -> StreamedFile:
        """A new file, to be written and finished."""
        origin = self._run_id, self._step
        made = StreamedFile(self._storage, self.folder, part, rank, pieces, origin, self._sha256)
        self._open.append(made)
        return made

    def finish(self, tables: Sequence[RankTable], texts: Mapping[str, str]) -> Manifest:
        """Write the JSON files (state.json, config.json, data.json) and the manifest; a rename makes it visible.

        tables: what each rank holds. Raises CheckpointError when they make no whole.
        """
        for name, text in texts.items():
            data = text.encode()
            write_file(self._storage, self.folder / name, memoryview(data))
            tables[0].files[name] = StoredFile(len(data), hashlib.sha256(data).hexdigest())
        manifest = assemble(tables, self._run_id, self._step, code_version())
        root = self.folder.parent
        commit(self._storage, manifest, self.folder, step_folder(root, self._step))
        if stored_steps(root)[0] == self._step:
            point_latest(self._storage, root, self._step, self._run_id)
        return manifest

    def close(self) -> None:
        """All files that are still open."""
        for file in self._open:
            file.close()


def _next_attempt(before: Sequence[Path]) -> int:
    """The first number that no folder before ends with."""
    known = {path.name.rpartition("-")[2] for path in before}
    return next(number for number in itertools.count(1) if str(number) not in known)


@contextmanager
def streamed_checkpoint(
    root: Path,
    step: int,
    run_id: str,
    *,
    mark: str,
    need: int,
    flag: str,
    sha256: bool = False,
    storage: Storage | None = None,
) -> Iterator[StreamedCheckpoint]:
    """A checkpoint of `step` to write and to `finish`; nothing of it stays after an error.

    mark: tells this attempt from others.  need: bytes, for messages.  flag: how the user named `root`.  sha256: put
    that of each tensor file into the manifest too.
    ConfigError if `root` has that step already; StorageError if the disk is full or cannot be written.
    """
    storage = storage or Storage()
    final = step_folder(root, step)
    if os.path.lexists(final):
        raise ConfigError(f"{flag} {root} has {final.name} already, which is not overwritten; give another directory.")
    folder = root / f"{final.name}.tmp-{mark}"
    made = None
    try:
        make_dirs(storage, root)
        # one that was killed left its folder; another may be at work in it
        before = [path for path in left_overs(root) if path.name.startswith(folder.name)]
        folder = folder.with_name(f"{folder.name}-{_next_attempt(before)}")
        storage.make_dir(folder)
        made = StreamedCheckpoint(storage, folder, run_id, step, sha256)
        yield made
        if os.path.lexists(final):
            # the step is there: nobody needs what they left
            for path in before:
                discard(storage, path)
    except OSError as error:
        raise StorageError(describe_failure(error, folder, need)) from error
    finally:
        if made is not None:
            made.close()
            if folder.exists():
                discard(storage, folder)
