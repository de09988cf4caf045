"""Token files on disk in Megatron's format, `<prefix>.bin` and `<prefix>.idx`, opened without reading them.

.idx, little endian, no alignment:
    offset 0     9 bytes    magic "MMIDIDX\\0\\0"
    9            uint64     version, 1
    17           uint8      dtype code (DTYPES)
    18           uint64     N, number of sequences
    26           uint64     D, number of documents + 1
    34           int32[N]   tokens in each sequence
    34 + 4N      int64[N]   byte offset of each sequence in .bin
    34 + 12N     int64[D]   first sequence of each document, then N
.bin: the tokens of all sequences one after the other, nothing else.
[format: NVIDIA/Megatron-LM core/datasets/indexed_dataset.py]
"""

from __future__ import annotations

import os
import struct
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.config.errors import DataError
from megatron_moe.data.hashes import BlockChecker, hash_file, hashes_path, read_hashes, way_out

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
UNSUPPORTED_DTYPES = {6: "float64", 7: "float32"}
# entries looked at together: bounds the memory of a check
CHUNK = 1 << 20
# an index up to this many sequences is checked whole when it is opened (tens of milliseconds)
CHECK_ON_OPEN = 1 << 22

IntArray = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type in which ids below `vocab_size` are stored: uint16 below 65,500, int32 from there, as in Megatron."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """The file of tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file of lengths, offsets and documents."""
    return Path(f"{prefix}.idx")


@dataclass(frozen=True)
class Header:
    """The first 34 bytes of an .idx file."""

    dtype: np.dtype[Any]
    num_sequences: int
    num_boundaries: int  # documents + 1

    def file_size(self) -> int:
        """Bytes of an .idx file with this header."""
        return HEADER.size + 12 * self.num_sequences + 8 * self.num_boundaries


def read_header(path: Path) -> Header:
    """Reads and checks the header against the file's length; DataError names what is wrong and what would be right."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(HEADER.size)
    if len(raw) < HEADER.size:
        raise DataError(f"{path} has {len(raw)} bytes, shorter than an index header ({HEADER.size}). {_again()}")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(raw)
    if magic != MAGIC:
        raise DataError(f"{path} is no Megatron index: it starts with {magic!r}, expected {MAGIC!r}. {_again()}")
    if version != 1:
        raise DataError(f"{path} has index version {version}; this program reads version 1. {_again()}")
    if code not in DTYPES:
        found = UNSUPPORTED_DTYPES.get(code, "unknown")
        known = ", ".join(f"{key} {np.dtype(value).name}" for key, value in DTYPES.items())
        raise DataError(f"{path} has dtype code {code} ({found}); tokens are stored as one of {known}. {_again()}")
    header = Header(np.dtype(DTYPES[code]).newbyteorder("<"), num_sequences, num_boundaries)
    if size == header.file_size() + num_sequences and num_sequences:
        raise DataError(f"{path} is the index of a multimodal set (a mode for each sequence); only text is read here.")
    if size != header.file_size():
        raise DataError(
            f"{path} has {size} bytes, but its header ({num_sequences} sequences, {num_boundaries} document bounds) "
            f"needs {header.file_size()}: it is cut short or damaged. {_again()}"
        )
    return header


def _again() -> str:
    return "Copy the .bin/.idx pair again, or make it again with tools/preprocess_data.py."


class IndexedDataset:
    """A corpus on disk; opening reads a header and a bounded part of the index, whatever the corpus's size.

    Sequences stand in .bin without gaps, so the corpus is one token stream: tokens(start, stop) reads from it directly.
    Where hashes stand beside the pair (data/hashes.py), .idx is compared with its own now, and each block of .bin when
    it is first read; use_hashes=False leaves them unread.
    Raises DataError if the pair is missing, cut, inconsistent or not what its hashes say.
    """

    def __init__(self, prefix: str | Path, *, use_hashes: bool = True) -> None:
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = idx_path(prefix), bin_path(prefix)
        _require_pair(self.prefix)
        header = read_header(self.idx_path)
        self.dtype = header.dtype
        self.num_sequences, self.num_documents = header.num_sequences, header.num_boundaries - 1
        self.bin_size = self.bin_path.stat().st_size
        raw = memoryview(np.memmap(self.idx_path, mode="r"))  # type: ignore[arg-type]
        # views into the map, unaligned: read by element or by slice, never whole
        offset = HEADER.size
        self.lengths: IntArray = np.frombuffer(raw, "<i4", self.num_sequences, offset)
        offset += 4 * self.num_sequences
        self.pointers: IntArray = np.frombuffer(raw, "<i8", self.num_sequences, offset)
        offset += 8 * self.num_sequences
        self.boundaries: IntArray = np.frombuffer(raw, "<i8", header.num_boundaries, offset)
        self._check_ends()
        self.verified = max(self.num_sequences, self.num_documents) <= CHECK_ON_OPEN
        if self.verified:
            self.verify_index()
        self._file = _open_random_access(self.bin_path)
        weakref.finalize(self, os.close, self._file)
        self.checker = self._open_checker() if use_hashes else None
        self.verified |= self.checker is not None

    def __len__(self) -> int:
        return self.num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens in the corpus."""
        return self.bin_size // self.dtype.itemsize

    def sequence(self, index: int) -> IntArray:
        """The tokens of one sequence."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        start = self.first_token(index)
        return self.tokens(start, start + int(self.lengths[index]))

    def document(self, index: int) -> list[IntArray]:
        """The sequences of one document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return [self.sequence(number) for number in range(int(self.boundaries[index]), int(self.boundaries[index + 1]))]

    def tokens(self, start: int, stop: int) -> IntArray:
        """Tokens start..stop-1 of the corpus read as one stream."""
        # a read, not a memory map: one access to the disk for a window, and a file cut meanwhile is no crash
        size, stop = self.dtype.itemsize, min(stop, self.num_tokens)
        raw = os.pread(self._file, max(stop - start, 0) * size, start * size)
        if len(raw) < (stop - start) * size:
            raise DataError(f"{self.bin_path} became shorter while it was read: {len(raw)} bytes at {start * size}.")
        if self.checker is not None:
            self.checker.check(start * size, stop * size)
        return np.frombuffer(raw, self.dtype)

    def first_token(self, sequence: int) -> int:
        """Where a sequence starts in the stream, in tokens; the end of the corpus for sequence = num_sequences."""
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def verify_index(self) -> None:
        """Reads the whole index in bounded pieces: lengths, offsets and documents must fit each other, or DataError."""
        for start in range(0, self.num_sequences, CHUNK):
            self.verify_sequences(start, min(start + CHUNK, self.num_sequences))
        for start in range(0, self.num_documents, CHUNK):
            part = self.boundaries[start : start + CHUNK + 1]
            wrong = np.flatnonzero(part[1:] < part[:-1])
            if wrong.size:
                at = int(wrong[0])
                raise DataError(
                    f"{self.idx_path}: document {start + at} starts at sequence {part[at]} but ends at {part[at + 1]}; "
                    f"the document table must not go down. {_again()}"
                )

    def verify_sequences(self, start: int, stop: int) -> None:
        """Sequences start..stop-1 each begin where the one before ends, and have no negative length; or DataError."""
        lengths = self.lengths[start:stop].astype(np.int64)
        begins = self.pointers[start : min(stop + 1, self.num_sequences)]
        ends = np.append(begins[1:], self.bin_size) if stop == self.num_sequences else begins[1:]
        wrong = np.flatnonzero((begins[: stop - start] + lengths * self.dtype.itemsize != ends) | (lengths < 0))
        if wrong.size:
            at = int(wrong[0])
            raise DataError(
                f"{self.idx_path}: sequence {start + at} has {lengths[at]} tokens from byte {begins[at]}, but the next "
                f"one starts (or {self.bin_path.name} ends) at byte {ends[at]}; there must be no gaps. {_again()}"
            )

    def fingerprint(self) -> str:
        """xxh3-128 of the .idx file, and the size of .bin: what a checkpoint keeps to know its corpus again."""
        return f"{self._index_hash}-{self.bin_size}"

    def tokens_fingerprint(self) -> str | None:
        """Changes when any token does; None without hashes, since all of .bin would have to be read."""
        return None if self.checker is None else self.checker.hashes.tokens_fingerprint()

    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer that made the tokens; None where the hashes do not say, or are not there."""
        return (self.checker.hashes.tokenizer or None) if self.checker is not None else None

    @cached_property
    def _index_hash(self) -> str:
        """Reads the whole index, once."""
        return hash_file(self.idx_path)

    def _open_checker(self) -> BlockChecker | None:
        """None for a bare pair; DataError unless .idx is what its hash says."""
        hashes = read_hashes(self.prefix, bin_bytes=self.bin_size)
        if hashes is None:
            return None
        if hashes.idx_xxh3_128 != self._index_hash:
            raise DataError(
                f"{self.idx_path} is damaged, or of another corpus: its xxh3-128 is {self._index_hash}, and "
                f"{hashes_path(self.prefix).name} says {hashes.idx_xxh3_128}. {way_out(self.prefix)}"
            )
        file = self._file
        return BlockChecker(hashes, self.prefix, lambda size, start: os.pread(file, size, start))

    def _check_ends(self) -> None:
        if self.num_documents < 0 or int(self.boundaries[0]) != 0 or int(self.boundaries[-1]) != self.num_sequences:
            ends = [int(value) for value in self.boundaries[[0, -1]]] if self.num_documents >= 0 else []
            raise DataError(
                f"{self.idx_path}: the document table must run from 0 to {self.num_sequences}, all sequences; "
                f"its ends are {ends}. {_again()}"
            )
        if self.num_sequences:
            end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        else:
            end = 0
        if end != self.bin_size:
            raise DataError(
                f"{self.bin_path} has {self.bin_size} bytes, but {self.idx_path.name} describes {end}: "
                f"one of the two is cut short, damaged or from another corpus. {_again()}"
            )


def _open_random_access(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened: {error.strerror}; a blend of many corpora may need `ulimit -n`."
        ) from error
    # reading ahead would fetch many times what a window needs
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _require_pair(prefix: str) -> None:
    # os.path takes any name for one that may not exist; pathlib raises for one that is too long
    missing = [str(path) for path in (idx_path(prefix), bin_path(prefix)) if not os.path.isfile(path)]
    if not missing:
        return
    folder, name = Path(prefix).parent, Path(prefix).name
    near = sorted(str(path)[: -len(".idx")] for path in folder.glob("*.idx")) if os.path.isdir(folder) else []
    likely = [candidate for candidate in near if Path(candidate).name.startswith(name)] or near
    hint = f"; in that folder there is: {', '.join(likely[:5])}" if likely else ""
    raise DataError(
        f"no corpus at '{prefix}': {' and '.join(missing)} not found. Give the path without .bin/.idx, as "
        f"tools/preprocess_data.py printed it (<output-prefix>_<key>_document){hint}."
    )
