"""Hashes of bytes that have just been read, computed in another thread while the next are on their way."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import xxhash

from megatron_moe.checkpoint.manifest import StoredSlice
from megatron_moe.checkpoint.tensor_file import Bytes

# (its bytes, as they were read; the slice that they are; its name for messages)
Piece = tuple[Bytes, StoredSlice, str]


class HashesBeside:
    """Compares slices with the hashes that they were stored with; the order is that in which they are given."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "hashes")
        self._pending: list[Future[list[str]]] = []
        self.checked: set[tuple[str, int]] = set()  # file and first byte of each slice that was given

    def __enter__(self) -> "HashesBeside":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=error is not None)

    def compare(self, pieces: Sequence[Piece]) -> None:
        """Whole slices, whose bytes stay as they are until `problems` returns."""
        self.checked.update((source.file, source.start) for _, source, _ in pieces)
        self._pending.append(self._thread.submit(_differing, pieces))

    def stream(self, source: StoredSlice, name: str) -> "Stream":
        """A whole slice, of which pieces are going to come."""
        self.checked.add((source.file, source.start))
        return Stream(self._thread, self._pending, source, name)

    def problems(self) -> list[str]:
        """Waits for all; which slices are not what was stored."""
        return [problem for future in self._pending for problem in future.result()]


class Stream:
    """One slice in pieces."""

    def __init__(
        self, thread: ThreadPoolExecutor, pending: list[Future[list[str]]], source: StoredSlice, name: str
    ) -> None:
        self._thread, self._pending, self._source, self._name = thread, pending, source, name
        self._hash = xxhash.xxh3_128()

    def update(self, data: Bytes) -> Future[None]:
        """The next bytes; they may change when the future is done."""
        return self._thread.submit(self._hash.update, data.data)

    def end(self) -> None:
        """That was all."""
        self._pending.append(self._thread.submit(self._verdict))

    def _verdict(self) -> list[str]:
        return [] if self._hash.hexdigest() == self._source.xxh3 else [_told(self._source, self._name)]


def _differing(pieces: Sequence[Piece]) -> list[str]:
    return [
        _told(source, name)
        for data, source, name in pieces
        if xxhash.xxh3_128_hexdigest(data.data) != source.xxh3
    ]


def _told(source: StoredSlice, name: str) -> str:
    return f"{source.file} is damaged or of another checkpoint: tensor '{name}' {source.rectangle} has another hash"
