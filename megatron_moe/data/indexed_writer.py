"""Writes `.bin/.idx` pairs, byte for byte as Megatron does, so that a reader sees a whole pair or none.

Both files grow as `<name>.partial` beside their place and are renamed when complete: .bin, then their hashes
(data/hashes.py), then .idx, with which the pair is there. The partial file is locked while its writer lives: what a
killed writer left behind is taken over, never published.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron_moe.config.errors import ConfigError, DataError, StorageError
from megatron_moe.config.whole_file import sync_folder, write_whole
from megatron_moe.data.hashes import BlockHasher, Hashes, hash_file, hashes_path
from megatron_moe.data.indexed_dataset import DTYPES, HEADER, MAGIC, IndexedDataset, IntArray, bin_path, idx_path

COPY_TOKENS = 1 << 23
OFFSETS_AT_ONCE = 1 << 20


class IndexedDatasetWriter:
    """Collects documents; `finish` publishes the pair, leaving the `with` block without it removes every trace.

    Keeps 4 bytes for each sequence and 8 for each document in memory.
    tokenizer: fingerprint of what makes the tokens, kept beside them; "" where it is not known.
    Raises ConfigError if the pair exists (unless `overwrite`) or is being written, StorageError if the disk fails.
    """

    def __init__(
        self, prefix: str | Path, *, dtype: np.dtype[Any], overwrite: bool = False, tokenizer: str = ""
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if np.dtype(known) == np.dtype(dtype))
        self._overwrite = overwrite
        self._tokenizer = tokenizer
        self._lengths: list[IntArray] = []
        self._boundaries: list[IntArray] = [np.zeros(1, np.int64)]
        self.num_sequences = self.num_documents = self.num_tokens = 0
        self._partial_paths = [Path(f"{path}.partial") for path in (bin_path(prefix), idx_path(prefix))]
        self._blocks = BlockHasher()
        # killed between its two renames, a writer leaves the one without the other: no pair, and nobody's
        self._half_published = os.path.exists(self._partial_paths[1]) and not os.path.exists(idx_path(prefix))
        self._refuse_existing()
        self._bin = _open_partial(self._partial_paths[0])

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def add_document(self, tokens: Sequence[int] | IntArray, lengths: Sequence[int] | IntArray | None = None) -> None:
        """One document: its tokens, and how they divide into sequences (None: one, or none if there are no tokens)."""
        array = np.asarray(tokens)
        parts = (
            np.array([array.size] if array.size else [], np.int32) if lengths is None else np.asarray(lengths, np.int32)
        )
        self._append(array, parts, np.array([parts.size], np.int64))

    def add_documents(self, tokens: IntArray, lengths: IntArray) -> None:
        """Many documents of one sequence each: all tokens, and tokens per document (0: a document without sequence)."""
        parts = np.asarray(lengths, np.int32)
        self._append(np.asarray(tokens), parts[parts > 0], (parts > 0).astype(np.int64))

    def add_dataset(self, source: IndexedDataset) -> None:
        """All documents of another corpus of the same token type."""
        if source.dtype != self.dtype:
            raise DataError(
                f"{source.prefix} stores {source.dtype.name} tokens and cannot be joined to {self.dtype.name}; "
                "preprocess both with the same tokenizer."
            )
        source.verify_index()
        for start in range(0, source.num_tokens, COPY_TOKENS):
            self._write(source.tokens(start, start + COPY_TOKENS))
        self._lengths.append(np.array(source.lengths, np.int32))
        self._boundaries.append(np.array(source.boundaries[1:], np.int64) + self.num_sequences)
        self._count(sequences=source.num_sequences, documents=source.num_documents, tokens=source.num_tokens)

    def finish(self) -> None:
        """Publishes the pair; the corpus is on the disk when this returns."""
        with _storage(self._partial_paths[1], "write the index"), _open_partial(self._partial_paths[1]) as index:
            self._write_index(index)
            _sync(index)
            self._refuse_existing()
            _sync(self._bin)
            hashes = self._hashes()
            # old hashes or an old index must never be seen beside new tokens
            hashes_path(self.prefix).unlink(missing_ok=True)
            idx_path(self.prefix).unlink(missing_ok=True)
            sync_folder(bin_path(self.prefix).parent)
            os.replace(self._partial_paths[0], bin_path(self.prefix))
            # before the index, with which the pair can be seen: no pair without its hashes
            write_whole(hashes_path(self.prefix), hashes.to_bytes())
            os.replace(self._partial_paths[1], idx_path(self.prefix))
            sync_folder(bin_path(self.prefix).parent)
        self._bin.close()

    def abandon(self) -> None:
        """Removes what `finish` has not published; does nothing after it."""
        if self._bin.closed:
            return
        for path in self._partial_paths:
            path.unlink(missing_ok=True)
        try:
            self._bin.close()
        except OSError:
            # a full disk refuses the last buffered bytes too; the file is gone already
            pass

    def _append(self, tokens: IntArray, lengths: IntArray, sequences_per_document: IntArray) -> None:
        if int(lengths.sum(dtype=np.int64)) != tokens.size:
            raise ValueError(f"lengths add up to {lengths.sum()}, but there are {tokens.size} tokens")
        self._write(tokens)
        self._lengths.append(lengths)
        self._boundaries.append(self.num_sequences + np.cumsum(sequences_per_document, dtype=np.int64))
        self._count(sequences=lengths.size, documents=sequences_per_document.size, tokens=tokens.size)

    def _count(self, *, sequences: int, documents: int, tokens: int) -> None:
        self.num_sequences += sequences
        self.num_documents += documents
        self.num_tokens += tokens

    def _write(self, tokens: IntArray) -> None:
        limits = np.iinfo(self.dtype)
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > limits.max):
            raise DataError(
                f"token ids {tokens.min()}..{tokens.max()} do not fit the {self.dtype.name} of {self.prefix}.bin "
                f"(0..{limits.max}); the tokenizer gives ids outside its own vocabulary size."
            )
        with _storage(self._partial_paths[0], "write tokens"):
            content = np.ascontiguousarray(tokens, self.dtype).reshape(-1).view(np.uint8).data
            self._blocks.update(content)
            self._bin.write(content)

    def _hashes(self) -> Hashes:
        """Of the tokens as they came, and of the index as it lies on the disk."""
        return Hashes(
            idx_xxh3_128=hash_file(self._partial_paths[1]),
            bin_bytes=self._blocks.num_bytes,
            block_bytes=self._blocks.block_bytes,
            blocks_xxh3_128=self._blocks.hexdigests(),
            tokenizer=self._tokenizer,
        )

    def _write_index(self, index: BinaryIO) -> None:
        index.write(HEADER.pack(MAGIC, 1, self._code, self.num_sequences, self.num_documents + 1))
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths]).astype("<i4", copy=False)
        index.write(lengths.data)
        pointer = 0
        for start in range(0, lengths.size, OFFSETS_AT_ONCE):
            size = lengths[start : start + OFFSETS_AT_ONCE].astype(np.int64) * self.dtype.itemsize
            ends = pointer + np.cumsum(size)
            index.write((ends - size).astype("<i8").data)
            pointer = int(ends[-1])
        for boundaries in self._boundaries:
            index.write(boundaries.astype("<i8", copy=False).data)

    def _refuse_existing(self) -> None:
        pair = [idx_path(self.prefix)] if self._half_published else [bin_path(self.prefix), idx_path(self.prefix)]
        existing = [str(path) for path in pair if os.path.exists(path)]
        if existing and not self._overwrite:
            raise ConfigError(
                f"{' and '.join(existing)} already there; nothing is overwritten. Choose another --output-prefix, "
                "or add --overwrite to replace it."
            )


def merge(prefixes: Sequence[str], output: str, *, overwrite: bool = False) -> int:
    """Joins corpora in the given order into one; returns its number of documents.

    Raises ConfigError if they are known to be made with different tokenizers.
    """
    if output in prefixes:
        raise ConfigError(f"the output '{output}' is one of the inputs; choose another --output-prefix.")
    sources = [IndexedDataset(prefix) for prefix in prefixes]
    tokenizer = _shared_tokenizer(sources)
    with IndexedDatasetWriter(output, dtype=sources[0].dtype, overwrite=overwrite, tokenizer=tokenizer) as writer:
        for source in sources:
            writer.add_dataset(source)
        writer.finish()
        return writer.num_documents


def _shared_tokenizer(sources: Sequence[IndexedDataset]) -> str:
    """Its fingerprint, if all corpora know it."""
    made = {source.prefix: source.tokenizer_fingerprint() for source in sources}
    known = sorted({fingerprint for fingerprint in made.values() if fingerprint})
    if len(known) > 1:
        first, other = (next(prefix for prefix, found in made.items() if found == wanted) for wanted in known[:2])
        raise ConfigError(
            f"{first} was made with a tokenizer of fingerprint {known[0]}, {other} with {known[1]}: ids of the one "
            "mean nothing to the other; preprocess both with the same tokenizer."
        )
    return known[0] if known and all(made.values()) else ""


class _storage:
    """Turns an OSError inside the block into a StorageError that names the file."""

    def __init__(self, path: Path, action: str) -> None:
        self.path, self.action = path, action

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise StorageError(
                f"cannot {self.action} to {self.path}: {error.strerror or error}. Nothing was published; make room or "
                "choose an --output-prefix on another disk, and run again."
            ) from error


def _open_partial(path: Path) -> BinaryIO:
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r} is no name of a file: it has a NUL in it; choose another --output-prefix.")
    with _storage(path, "open a file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # who held the lock may have renamed or removed the file since it was opened
            ours = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            file.close()
            raise ConfigError(f"another process is writing {path}; wait for it or choose another --output-prefix.")
        file.truncate(0)
        return file


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
