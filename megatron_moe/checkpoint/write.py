"""One rank's share of a checkpoint: its files, and the table that tells the first rank what is in them."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_moe.checkpoint.manifest import StoredFile
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.checkpoint.snapshot import HostBlock, HostBlocks, Snapshot
from megatron_moe.checkpoint.storage import Storage, describe_failure, write_file
from megatron_moe.checkpoint.tensor_file import HEADER_LIMIT_BYTES, header_bytes
from megatron_moe.config.errors import CheckpointError


@dataclass(frozen=True)
class HeldSlice:
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
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> "RankTable":
        found: dict[str, Any] = json.loads(text)
        return cls(
            {name: StoredFile(**entry) for name, entry in found["files"].items()},
            [_held(entry) for entry in found["slices"]],
            found["problem"],
            found["storage"],
        )


def _held(entry: dict[str, Any]) -> HeldSlice:
    rectangle = Rectangle(tuple(entry["rectangle"]["offset"]), tuple(entry["rectangle"]["shape"]))
    return HeldSlice(**(entry | {"rectangle": rectangle, "global_shape": tuple(entry["global_shape"])}))


@dataclass(frozen=True)
class Share:
    """All that one rank writes: its snapshot and, on the first rank, the JSON files."""

    folder: Path
    rank: int
    snapshot: Snapshot
    texts: Mapping[str, bytes]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        tensors = sum(len(part.written.data) for part in self.snapshot.values())
        return tensors + sum(len(text) for text in self.texts.values())


def write_share(storage: Storage, share: Share) -> RankTable:
    """Write this rank's files and sync them. Never raises an Exception: the table says what went wrong."""
    path = share.folder
    try:
        table = RankTable()
        for part, snapshot in share.snapshot.items():
            path = share.folder / f"{part}-r{share.rank:05d}.safetensors"
            _write_part(storage, path, part, snapshot.written, share.metadata, table)
            compared = snapshot.compared
            table.slices.extend(_held_slice(part, block, compared, primary=False) for block in compared.blocks)
        for name, data in share.texts.items():
            path = share.folder / name
            write_file(storage, path, memoryview(data))
            table.files[name] = StoredFile(len(data), hashlib.sha256(data).hexdigest())
        return table
    except OSError as error:
        return RankTable(problem=describe_failure(error, path, share.num_bytes), storage=True)
    except Exception as error:  # a thread that dies in silence would stop all later saves
        return RankTable(problem=f"{path}: {type(error).__name__}: {error}")


def _write_part(
    storage: Storage, path: Path, part: str, blocks: HostBlocks, metadata: dict[str, str], table: RankTable
) -> None:
    if len(blocks.data) == 0:
        table.slices.extend(_held_slice(part, block, blocks, primary=True) for block in blocks.blocks)
        return
    filled = [block for block in blocks.blocks if block.length]
    keys = [block.key for block in filled]
    twice = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else set()
    if twice:
        raise CheckpointError(f"this rank has {part} tensor {sorted(twice)[0]!r} twice")
    head = header_bytes([(block.key, block.dtype, block.rectangle.shape) for block in filled], metadata)
    if len(head) > HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{part} has too many tensors on one rank: a header of {len(head):,} bytes")
    # hashes are computed beside the disk, not before or after it
    with ThreadPoolExecutor(1) as beside:
        digests = beside.submit(_digests, part, blocks, head, path.name)
        write_file(storage, path, memoryview(head), blocks.data.data)
        file, slices = digests.result()
    table.files[path.name] = file
    table.slices.extend(slices)


def _digests(part: str, blocks: HostBlocks, head: bytes, file: str) -> tuple[StoredFile, list[HeldSlice]]:
    slices = [_held_slice(part, block, blocks, primary=True, file=file, header=len(head)) for block in blocks.blocks]
    whole = hashlib.sha256(head)
    whole.update(blocks.data.data)
    size = len(head) + len(blocks.data)
    return StoredFile(size, whole.hexdigest(), len(head), xxhash.xxh3_128_hexdigest(head)), slices


def _held_slice(
    part: str, block: HostBlock, blocks: HostBlocks, primary: bool, file: str = "", header: int = 0
) -> HeldSlice:
    digest = xxhash.xxh3_128_hexdigest(blocks.data.data[block.start : block.start + block.length])
    written = file if block.length else ""
    return HeldSlice(
        part,
        block.name,
        block.dtype,
        block.global_shape,
        block.rectangle,
        primary,
        digest,
        file=written,
        start=header + block.start,
        length=block.length,
    )
