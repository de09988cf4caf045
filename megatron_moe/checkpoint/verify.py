"""Is this folder a whole, undamaged checkpoint? A look at manifest and sizes, then hashes, spread over the ranks."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from megatron_moe.checkpoint.manifest import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    TEXT_FILES,
    Manifest,
    StoredSlice,
    parse_manifest,
)
from megatron_moe.checkpoint.tensor_file import Bytes, read_exactly
from megatron_moe.config.errors import CheckpointError

# "sizes": manifest, sizes and the JSON files only; "xxh3": all bytes, fast; "sha256": all bytes, by the SHA-256 of each
# file that has one; "on_read": as "sizes" and the headers of the tensor files, and the tensors when they are read
Check = Literal["sizes", "on_read", "xxh3", "sha256"]

# JSON files are small; a larger one is an accident
_TEXT_LIMIT_BYTES = 100_000_000
CHUNK_BYTES = 8 << 20


@contextmanager
def opened(path: Path, size: int | None) -> Iterator[int]:
    """A plain file, open for reading, of exactly `size` bytes if given; CheckpointError for a link, pipe or device."""
    try:
        # without O_NONBLOCK a pipe in the file's place would wait for its writer
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path.name} is not a plain file")
        if size is not None and found.st_size != size:
            raise CheckpointError(f"{path.name} has {found.st_size:,} bytes, but {size:,} were written")
        yield file
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    finally:
        os.close(file)


def _read_small(path: Path, size: int | None, limit: int) -> bytes:
    with opened(path, size) as file:
        length = os.fstat(file).st_size
        if length > limit:
            raise CheckpointError(f"{path.name} has {length:,} bytes; at most {limit:,} are read")
        data = np.empty(length, dtype=np.uint8)
        read_exactly(file, data, 0)
        return data.tobytes()


@dataclass(frozen=True)
class Papers:
    """The small files of a checkpoint, as text; the manifest's hash holds and those of the others too."""

    manifest: str
    texts: dict[str, str]


def look(folder: Path, step: int) -> tuple[Manifest, Papers]:
    """Read the manifest and the JSON files, and compare all sizes; no tensor is read. Raises CheckpointError."""
    manifest, text = read_manifest(folder, step)
    texts = {name: read_text(folder, manifest, name) for name in manifest.files if name in TEXT_FILES}
    for name, file in manifest.files.items():
        if name not in TEXT_FILES:
            with opened(folder / name, file.size):
                pass
    return manifest, Papers(text, texts)


def read_manifest(folder: Path, step: int) -> tuple[Manifest, str]:
    """The manifest of a step's folder, and its text. Raises CheckpointError."""
    if not _is_folder(folder):
        raise CheckpointError(f"{folder.name} is not a folder that can be read")
    data = _read_small(folder / MANIFEST, None, MANIFEST_LIMIT_BYTES)
    manifest = parse_manifest(data)
    if manifest.step != step:
        raise CheckpointError(f"{MANIFEST} is that of step {manifest.step}, not of {folder.name}")
    return manifest, data.decode()


def read_text(folder: Path, manifest: Manifest, name: str) -> str:
    """A JSON file whose hash holds. Raises CheckpointError."""
    text = _read_small(folder / name, manifest.files[name].size, _TEXT_LIMIT_BYTES)
    if hashlib.sha256(text).hexdigest() != manifest.files[name].sha256:
        raise CheckpointError(f"{name} is damaged or of another checkpoint: its SHA-256 is not the manifest's")
    return text.decode()


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file and the hash that they must have."""

    file: str
    start: int
    length: int
    digest: str
    what: str
    kind: Literal["xxh3", "sha256"] = "xxh3"


def stretches_of(manifest: Manifest, check: Check) -> list[Stretch]:
    """All bytes of all tensor files, in order; none for "sizes", the headers for "on_read"."""
    tensor_files = {name: file for name, file in manifest.files.items() if name not in TEXT_FILES}
    if check == "sizes":
        return []
    whole = {name: file for name, file in tensor_files.items() if file.sha256} if check == "sha256" else {}
    found = [Stretch(name, 0, file.size, file.sha256, "the file", "sha256") for name, file in whole.items()]
    pieces = {name: file for name, file in tensor_files.items() if name not in whole}
    found += [Stretch(name, 0, file.header, file.header_xxh3, "the header") for name, file in pieces.items()]
    if check == "on_read":
        return sorted(found, key=lambda stretch: stretch.file)
    for part, tensors in manifest.parts.items():
        for name, tensor in tensors.items():
            for piece in tensor.slices:
                if piece.file not in whole:
                    what = f"{part} tensor '{name}' {piece.rectangle}"
                    found.append(Stretch(piece.file, piece.start, piece.length, piece.xxh3, what))
    return sorted(found, key=lambda stretch: (stretch.file, stretch.start))


def _share(stretches: list[Stretch], rank: int, world_size: int) -> list[Stretch]:
    """This rank's even share of the bytes, next to each other on the disk."""
    total = sum(stretch.length for stretch in stretches)
    mine, before = [], 0
    for stretch in stretches:
        middle = before + stretch.length // 2
        if middle * world_size // max(1, total) == rank:
            mine.append(stretch)
        before += stretch.length
    return mine


def check_share(folder: Path, manifest: Manifest, rank: int, world_size: int, check: Check) -> str:
    """Hash this rank's share of the files; returns what is wrong, "" when nothing is."""
    return check_stretches(folder, manifest, _share(stretches_of(manifest, check), rank, world_size))


def check_unread(
    folder: Path, manifest: Manifest, unread: Sequence[tuple[str, StoredSlice]], rank: int, world_size: int
) -> str:
    """The same for slices (with the names of their tensors) that no rank has read whole."""
    stretches = [
        Stretch(piece.file, piece.start, piece.length, piece.xxh3, f"tensor '{name}' {piece.rectangle}")
        for name, piece in unread
    ]
    ordered = sorted(stretches, key=lambda stretch: (stretch.file, stretch.start))
    return check_stretches(folder, manifest, _share(ordered, rank, world_size))


def check_stretches(folder: Path, manifest: Manifest, stretches: Sequence[Stretch]) -> str:
    """Read and hash them; returns what is wrong with the first that are."""
    scratch = np.empty(CHUNK_BYTES if stretches else 0, dtype=np.uint8)
    problems: list[str] = []
    for name in sorted({stretch.file for stretch in stretches}):
        try:
            with opened(folder / name, manifest.files[name].size) as file:
                if header_length(file) != manifest.files[name].header:
                    problems.append(f"{name}: its header does not have the length that the manifest says")
                for stretch in stretches:
                    if stretch.file == name and digest_of(file, stretch, scratch) != stretch.digest:
                        problems.append(f"{name} is damaged or of another checkpoint: {stretch.what} has another hash")
        except CheckpointError as error:
            problems.append(str(error))
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def header_length(file: int) -> int:
    """Bytes before the first tensor, by what the file says."""
    head = np.empty(8, dtype=np.uint8)
    read_exactly(file, head, 0)
    return 8 + int.from_bytes(head.tobytes(), "little")


def digest_of(file: int, stretch: Stretch, scratch: Bytes) -> str:
    """Its hash as it is on the disk, read through `scratch`. Raises OSError, EOFError."""
    hasher = hashlib.sha256() if stretch.kind == "sha256" else xxhash.xxh3_128()
    for start in range(0, stretch.length, len(scratch)):
        part = scratch[: min(len(scratch), stretch.length - start)]
        read_exactly(file, part, stretch.start + start)
        hasher.update(part.data)
    return hasher.hexdigest()
