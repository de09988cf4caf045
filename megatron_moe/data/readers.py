"""Opens text files of every kind and hands out their documents one after another, with the place where each stands."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.config.optional import require
from megatron_moe.data.parquet import read_rows

TextUnit = Literal["file", "paragraph", "line"]
# a longer line or document is refused instead of filling the memory, as a small file made to unpack to terabytes would
MAX_LINE_BYTES = 1 << 28
JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
PLAIN_TEXT = (".txt", ".txt.gz", ".txt.zst")
PARQUET = (".parquet",)


@dataclass(frozen=True)
class Record:
    """A document as read, before it is understood; `content` None: it could not be read, `problem` says why."""

    path: str
    number: int  # line or row, from 1
    unit: str  # "line" or "row"
    content: bytes | dict[str, Any] | None  # a line of JSON, or the value of each field
    problem: str = ""

    @property
    def place(self) -> str:
        """For messages: file, line."""
        return f"{self.path}, {self.unit} {self.number}"


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that names and patterns mean, each pattern sorted; ConfigError for none, or a kind that is not read."""
    paths: list[Path] = []
    for pattern in patterns:
        # os.path takes any name for one that may not exist; pathlib raises for one that is too long
        found = [pattern] if os.path.isfile(pattern) else _matching(pattern)
        files = [Path(path) for path in found if os.path.isfile(path)]
        if not files:
            raise ConfigError(
                f"--input '{pattern}' names no file; check the path, and quote patterns such as 'data/*.jsonl'."
            )
        paths += files
    known = JSON_LINES + PLAIN_TEXT + PARQUET
    unknown = [str(path) for path in paths if not path.name.endswith(known)]
    if unknown:
        raise ConfigError(f"--input {unknown[0]} is of no kind that is read here; known endings: {', '.join(known)}.")
    return paths


def _matching(pattern: str) -> list[str]:
    try:
        return sorted(glob.glob(pattern, recursive=True))
    except ValueError:  # a NUL
        return []


def is_text(path: Path) -> bool:
    """Whether this file is text without fields."""
    return path.name.endswith(PLAIN_TEXT)


class RecordReader:
    """The documents of files in order, in bounded memory (of one document); blank lines are none.

    Plain text has one field, the first of `keys`. Raises DataError if a file itself is damaged.
    """

    def __init__(self, paths: Sequence[Path], *, keys: Sequence[str], text_unit: TextUnit = "file") -> None:
        self.paths, self.keys, self.text_unit = tuple(paths), tuple(keys), text_unit
        self.num_bytes = sum(path.stat().st_size for path in paths)
        self._bytes_before = 0
        self._file: BinaryIO | None = None

    @property
    def position(self) -> int:
        """Bytes of the files, as they lie on the disk, that have been read so far."""
        return self._bytes_before + (self._file.tell() if self._file else 0)

    def __iter__(self) -> Iterator[Record]:
        self._bytes_before = 0
        for path in self.paths:
            if path.name.endswith(PARQUET):
                yield from _read_parquet(path, self.keys)
            else:
                yield from self._read_stream(path)
            self._bytes_before += path.stat().st_size

    def _read_stream(self, path: Path) -> Iterator[Record]:
        try:
            with path.open("rb") as self._file, uncompressed(path, self._file) as stream:
                if path.name.endswith(JSON_LINES):
                    yield from _read_lines(path, stream)
                else:
                    yield from _read_text(path, stream, self.keys[0], self.text_unit)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is damaged or cut short ({error}); copy it again.") from error
        finally:
            self._file = None


def uncompressed(path: Path, file: BinaryIO) -> BinaryIO:
    """The bytes of an open file, uncompressed as they are read if its name says so."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file, mode="rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardStream(file))
    return file


class _ZstandardStream(io.RawIOBase):
    """zstandard's reader, with an end that is missing told as EOFError instead of taken for the end of the text."""

    def __init__(self, file: BinaryIO) -> None:
        self._library = require("zstandard", extra="data")
        self._file = file
        self._decompressor = self._library.ZstdDecompressor().decompressobj(read_across_frames=False)
        self._compressed = self._text = b""
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text and self._refill():
            self._decompress()
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _refill(self) -> bool:
        if not self._compressed:
            # small pieces bound what a file made to explode can grow to at once: some 30 MB
            self._compressed = self._file.read(1 << 10)
        if not self._compressed and self._inside:
            raise EOFError("the last zstandard frame has no end")
        return bool(self._compressed)

    def _decompress(self) -> None:
        try:
            self._text = self._decompressor.decompress(self._compressed)
        except self._library.ZstdError as error:
            raise EOFError(str(error)) from error
        self._compressed, self._inside = self._decompressor.unused_data, not self._decompressor.eof
        if self._decompressor.eof:
            self._decompressor = self._library.ZstdDecompressor().decompressobj(read_across_frames=False)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number, from 1; None for one that is too long, of which the rest is passed over."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield number, None


def _read_lines(path: Path, stream: BinaryIO) -> Iterator[Record]:
    for number, line in _lines(stream):
        if line is None:
            yield Record(str(path), number, "line", None, _too_long())
        elif line.strip():
            yield Record(str(path), number, "line", line)


def _read_text(path: Path, stream: BinaryIO, key: str, unit: TextUnit) -> Iterator[Record]:
    if unit == "file":
        content = stream.read(MAX_LINE_BYTES + 1)
        if content.strip():
            yield _text_record(path, 1, content, key)
    elif unit == "line":
        for number, line in _lines(stream):
            if line is None or line.strip():
                yield _text_record(path, number, None if line is None else line.rstrip(b"\r\n"), key)
    else:
        for number, paragraph in _paragraphs(stream):
            yield _text_record(path, number, paragraph, key)


def _paragraphs(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Lines between blank ones, with the number of the first; None for a paragraph that is too long."""
    parts: list[bytes] = []
    first = size = 0
    for number, line in _lines(stream):
        if line is None or line.strip():
            first = first or number
            size += MAX_LINE_BYTES + 1 if line is None else len(line)
            if line is None or size > MAX_LINE_BYTES:
                parts = []
            else:
                parts.append(line)
        elif first:
            yield first, b"".join(parts) if size <= MAX_LINE_BYTES else None
            parts, first, size = [], 0, 0
    if first:
        yield first, b"".join(parts) if size <= MAX_LINE_BYTES else None


def _too_long() -> str:
    return f"longer than {MAX_LINE_BYTES} bytes, which is no document but an accident, or made to fill the memory"


def _text_record(path: Path, number: int, content: bytes | None, key: str) -> Record:
    if content is None or len(content) > MAX_LINE_BYTES:
        return Record(str(path), number, "line", None, _too_long())
    try:
        return Record(str(path), number, "line", {key: content.decode()})
    except UnicodeDecodeError as error:
        return Record(str(path), number, "line", None, f"not UTF-8 text ({error.reason} at byte {error.start})")


def _read_parquet(path: Path, keys: Sequence[str]) -> Iterator[Record]:
    for number, row in enumerate(read_rows(path, keys, longest=MAX_LINE_BYTES), start=1):
        yield Record(str(path), number, "row", row, "" if row is not None else _too_long())
