"""One rank's share of a checkpoint: its files, and the table that tells the first rank what is in them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from megatron_moe.checkpoint.manifest import StoredFile
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.checkpoint.snapshot import HostBlock, HostBlocks, Snapshot
from megatron_moe.checkpoint.storage import DIRECT_BYTES, PAGE_BYTES, Storage, describe_failure, write_file
from megatron_moe.checkpoint.tensor_file import HEADER_LIMIT_BYTES, Bytes, header_bytes
from megatron_moe.config.errors import CheckpointError


class HeldSlice(NamedTuple):
    """A rectangle on one rank. file is "" for one that this rank does not write (a replica, or nothing in it)."""

    part: str
    name: str
    dtype: str
    global_shape: tuple[int, ...]
    rectangle: Rectangle
    primary: bool
    xxh3: str
    file: str = ""
    start: int = 0
    length: int = 0


@dataclass(frozen=True)
class RankTable:
    """What one rank wrote and holds; or why it could not. storage: the disk's fault, not the tensors'."""

    files: dict[str, StoredFile] = field(default_factory=dict)
    slices: list[HeldSlice] = field(default_factory=list)
    problem: str = ""
    storage: bool = False

    def to_text(self) -> str:
        found = vars(self) | {
            "files": {name: vars(file) for name, file in self.files.items()},
            # rows, not tables: a rank may hold a hundred thousand
            "slices": [_row(piece) for piece in self.slices],
        }
        return json.dumps(found, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> "RankTable":
        found: dict[str, Any] = json.loads(text)
        return cls(
            {name: StoredFile(**entry) for name, entry in found["files"].items()},
            [_held(entry) for entry in found["slices"]],
            found["problem"],
            found["storage"],
        )


def _row(piece: HeldSlice) -> tuple[Any, ...]:
    place = (piece.rectangle.offset, piece.rectangle.shape)
    return tuple(place if value is piece.rectangle else value for value in piece)


def _held(row: list[Any]) -> HeldSlice:
    part, name, dtype, global_shape, (offset, shape), *others = row
    return HeldSlice(part, name, dtype, tuple(global_shape), Rectangle(tuple(offset), tuple(shape)), *others)


@dataclass(frozen=True)
class Share:
    """All that one rank writes: its snapshot and, on the first rank, the JSON files.

    sha256: also compute that of its tensor files, which takes longer than a fast disk.
    """

    folder: Path
    rank: int
    snapshot: Snapshot
    texts: Mapping[str, bytes]
    metadata: dict[str, str]
    sha256: bool = False

    @property
    def num_bytes(self) -> int:
        tensors = sum(len(part.written.data) for part in self.snapshot.values())
        return tensors + sum(len(text) for text in self.texts.values())


def write_share(storage: Storage, share: Share) -> RankTable:
    """Write this rank's files and sync them. Never raises an Exception: the table says what went wrong."""
    path = share.folder
    try:
        table = RankTable()
        # hashes are computed beside the disk, not before or after it
        with ThreadPoolExecutor(max(1, 3 * len(share.snapshot))) as beside:
            parts = [_begin(beside, share, part) for part in share.snapshot]
            for content in (begun.content.result() for begun in parts):
                path = content.path
                if len(content.data):
                    write_file(storage, path, memoryview(content.head), content.data.data)
            for name, data in share.texts.items():
                path = share.folder / name
                write_file(storage, path, memoryview(data))
                table.files[name] = StoredFile(len(data), hashlib.sha256(data).hexdigest())
            for begun in parts:
                _enter(table, begun, share.snapshot[begun.content.result().part].compared)
        return table
    except OSError as error:
        return RankTable(problem=describe_failure(error, path, share.num_bytes), storage=True)
    except CheckpointError as error:
        return RankTable(problem=str(error))
    except Exception as error:  # a thread that dies in silence would stop all later saves
        return RankTable(problem=f"{path}: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Content:
    """One part of this rank: what its file is going to hold; no file when there are no bytes."""

    path: Path
    part: str
    blocks: tuple[HostBlock, ...]
    head: bytes
    data: Bytes


def _content(path: Path, part: str, written: HostBlocks, metadata: dict[str, str]) -> _Content:
    blocks = written.described()
    filled = [block for block in blocks if block.length]
    keys = [block.key for block in filled]
    twice = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else set()
    if twice:
        raise CheckpointError(f"this rank has {part} tensor {sorted(twice)[0]!r} twice")
    entries = [(key, block.dtype, block.rectangle.shape) for key, block in zip(keys, filled, strict=True)]
    # the bytes of a large file begin where they can be written without a copy
    head = header_bytes(entries, metadata, PAGE_BYTES if len(written.data) >= DIRECT_BYTES else 8)
    if len(head) > HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{part} has too many tensors on one rank: a header of {len(head):,} bytes")
    return _Content(path, part, blocks, head, written.data)


@dataclass(frozen=True)
class _Begun:
    """One part, looked at and hashed in other threads. whole: SHA-256 of the file, if wanted; blocks: xxh3-128 of each.
    """

    content: Future[_Content]
    whole: Future[str] | None
    blocks: Future[list[str]]


def _begin(beside: Executor, share: Share, part: str) -> _Begun:
    path = share.folder / f"{part}-r{share.rank:05d}.safetensors"
    content = beside.submit(_content, path, part, share.snapshot[part].written, share.metadata)

    def blocks() -> list[str]:
        return _block_digests(content.result().blocks, content.result().data)

    whole = beside.submit(lambda: _file_digest(content.result())) if share.sha256 else None
    return _Begun(content, whole, beside.submit(blocks))


def _file_digest(content: _Content) -> str:
    whole = hashlib.sha256(content.head)
    whole.update(content.data.data)
    return whole.hexdigest()


def _block_digests(blocks: Sequence[HostBlock], data: Bytes) -> list[str]:
    view = data.data
    return [xxhash.xxh3_128_hexdigest(view[block.start : block.start + block.length]) for block in blocks]


def _enter(table: RankTable, begun: _Begun, compared: HostBlocks) -> None:
    """What is known of one part, once it is written."""
    content = begun.content.result()
    head, file = len(content.head), ""
    if len(content.data):
        file = content.path.name
        header = xxhash.xxh3_128_hexdigest(content.head)
        whole = begun.whole.result() if begun.whole else ""
        table.files[file] = StoredFile(head + len(content.data), whole, head, header)
    for block, digest in zip(content.blocks, begun.blocks.result(), strict=True):
        table.slices.append(_held_slice(content.part, block, digest, True, file if block.length else "", head))
    replicas = compared.described()
    for block, digest in zip(replicas, _block_digests(replicas, compared.data), strict=True):
        table.slices.append(_held_slice(content.part, block, digest, False, "", 0))


def _held_slice(part: str, block: HostBlock, digest: str, primary: bool, file: str, header: int) -> HeldSlice:
    what = (block.name, block.dtype, block.global_shape, block.rectangle)
    return HeldSlice(part, *what, primary, digest, file, start=header + block.start, length=block.length)
