"""Text files to `.bin/.idx` pairs, in parallel; the output does not depend on the number of workers.

The main process reads and writes; workers understand and tokenize. Batches go round the workers in turn and come back
in the same order, at most two on the way to each, so memory is bounded and order needs no bookkeeping.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np

from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.data.indexed_dataset import IntArray, token_dtype
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.data.readers import Record, RecordReader, TextUnit, find_inputs, is_text
from megatron_moe.data.tokenizer import NullTokenizer, Tokenizer, TokenizerFiles, open_tokenizer
from megatron_moe.data.workers import Workers

BATCH_RECORDS = 256
BATCH_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What tools/preprocess_data.py is told."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerFiles
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    max_documents: int | None = None
    on_error: Literal["stop", "skip"] = "stop"
    text_document: TextUnit = "file"
    overwrite: bool = False


@dataclass(frozen=True)
class Problem:
    """A record that is no document."""

    place: str
    reason: str
    after: int  # documents of its batch before it


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of one batch in order, by key: all tokens, and how many each document has."""

    tokens: dict[str, IntArray]
    lengths: dict[str, IntArray]  # (documents,) int32
    problems: list[Problem]

    @property
    def num_documents(self) -> int:
        """Documents that were understood."""
        return len(next(iter(self.lengths.values())))

    def first(self, limit: int) -> EncodedBatch:
        """The first `limit` documents and the problems among them."""
        lengths = {key: value[:limit] for key, value in self.lengths.items()}
        tokens = {key: value[: int(lengths[key].sum(dtype=np.int64))] for key, value in self.tokens.items()}
        return EncodedBatch(tokens, lengths, [problem for problem in self.problems if problem.after < limit])


@dataclass(frozen=True)
class Progress:
    """How far the work is; `prefixes` is filled when all is written."""

    bytes_read: int
    bytes_total: int
    num_documents: int
    num_tokens: int
    num_skipped: int
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Turns records into tokens; sent to the workers, each of which opens the tokenizer once."""

    files: TokenizerFiles
    keys: tuple[str, ...]
    append_eod: bool
    stop_at_problem: bool

    def open(self) -> Callable[[Sequence[Record]], EncodedBatch]:
        """A function that encodes a batch."""
        tokenizer = open_tokenizer(self.files)
        return lambda records: self._encode(records, tokenizer)

    def _encode(self, records: Sequence[Record], tokenizer: Tokenizer) -> EncodedBatch:
        documents: list[list[list[int]]] = []
        problems: list[Problem] = []
        for record in records:
            try:
                texts = read_fields(record, self.keys)
                documents.append([self._tokens(text, tokenizer) for text in texts])
            except DataError as error:
                problems.append(Problem(record.place, str(error), len(documents)))
                if self.stop_at_problem:
                    break
        tokens, lengths = {}, {}
        for number, key in enumerate(self.keys):
            parts = [document[number] for document in documents]
            lengths[key] = np.array([len(part) for part in parts], np.int32)
            # every id was checked against the vocabulary, so it fits
            tokens[key] = np.fromiter(chain.from_iterable(parts), token_dtype(tokenizer.vocab_size))
        return EncodedBatch(tokens, lengths, problems)

    def _tokens(self, text: str, tokenizer: Tokenizer) -> list[int]:
        ids = tokenizer.encode(text)
        if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            raise DataError(f"the tokenizer gave id {max(ids)} with a vocabulary of {tokenizer.vocab_size}")
        # as in Megatron, a text without tokens stays empty
        return [*ids, tokenizer.eod_id] if ids and self.append_eod and tokenizer.eod_id is not None else ids


def read_fields(record: Record, keys: Sequence[str]) -> list[str]:
    """The text of each key; DataError says why the record is no document."""
    if record.content is None:
        raise DataError(record.problem)
    fields: Any = record.content
    if isinstance(record.content, bytes):
        try:
            fields = json.loads(record.content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f'expected a JSON object such as {{"{keys[0]}": "..."}}, found a {type(fields).__name__}')
    return [_read_field(fields, key) for key in keys]


def _read_field(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        found = ", ".join(repr(name) for name in list(fields)[:5]) or "none"
        raise DataError(f"no key '{key}' (keys here: {found}); name the key of the text with --json-keys")
    value = fields[key]
    if not isinstance(value, str):
        raise DataError(f"the value of '{key}' is a {type(value).__name__}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the value of '{key}' is no valid Unicode ({error.reason})") from error
    return value


def preprocess(
    options: PreprocessOptions, *, report: Callable[[Progress], None], skipped: Callable[[str], None]
) -> Progress:
    """Writes `<output_prefix>_<key>_document.{bin,idx}` for each key: all of them, or nothing.

    `report` is told of the progress after each batch, `skipped` of each record left out ("file, line: why").
    Raises ConfigError for flags that contradict each other, DataError for input that cannot be read.
    """
    tokenizer = open_tokenizer(options.tokenizer)
    paths = find_inputs(options.inputs)
    check_options(options, tokenizer, has_text=any(is_text(path) for path in paths))
    reader = RecordReader(paths, keys=options.json_keys, text_unit=options.text_document)
    encoder = Encoder(options.tokenizer, options.json_keys, options.append_eod, options.on_error == "stop")
    prefixes = tuple(f"{options.output_prefix}_{key}_document" for key in options.json_keys)
    opened = partial(
        IndexedDatasetWriter,
        dtype=token_dtype(tokenizer.vocab_size),
        overwrite=options.overwrite,
        # what ids mean that were given as numbers, nobody knows
        tokenizer="" if isinstance(tokenizer, NullTokenizer) else tokenizer.fingerprint(),
    )
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(opened(prefix))
            for key, prefix in zip(options.json_keys, prefixes, strict=True)
        }
        progress = Progress(0, reader.num_bytes, 0, 0, 0)
        batches = stack.enter_context(Workers(encoder.open, options.workers)).map(_batches(reader))
        for batch in batches:
            progress = _write(batch, writers, options, reader, before=progress, skipped=skipped)
            report(progress)
            if progress.num_documents == options.max_documents:
                break
        if not progress.num_documents:
            raise DataError(f"--input {' '.join(options.inputs)} holds no document; nothing was written.")
        for writer in writers.values():
            writer.finish()
    return Progress(
        reader.num_bytes, reader.num_bytes, progress.num_documents, progress.num_tokens, progress.num_skipped, prefixes
    )


def check_options(options: PreprocessOptions, tokenizer: Tokenizer, *, has_text: bool) -> None:
    """ConfigError for flags that contradict each other."""
    if options.append_eod and tokenizer.eod_id is None:
        raise ConfigError("--append-eod needs a tokenizer with an end-of-document token; this one has none.")
    for key in options.json_keys:
        # it becomes a part of a file's name
        if not key or "/" in key or not key.isprintable():
            raise ConfigError(
                f"--json-keys {key!r} would be part of a file name, {options.output_prefix}_KEY_document, and cannot: "
                "it is empty, or has a slash or a control character; rename the key in the input."
            )
    if len(set(options.json_keys)) != len(options.json_keys):
        raise ConfigError(f"--json-keys {' '.join(options.json_keys)} names a key twice.")
    if has_text and len(options.json_keys) > 1:
        raise ConfigError("plain text has one field, so --json-keys must name one key when an --input is plain text.")
    if options.workers < 1 or (options.max_documents is not None and options.max_documents < 1):
        raise ConfigError("--workers and --max-documents must be at least 1.")


def _batches(reader: RecordReader) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in reader:
        batch.append(record)
        content = record.content
        size += sum(len(str(value)) for value in content.values()) if isinstance(content, dict) else len(content or b"")
        if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    batch: EncodedBatch,
    writers: dict[str, IndexedDatasetWriter],
    options: PreprocessOptions,
    reader: RecordReader,
    *,
    before: Progress,
    skipped: Callable[[str], None],
) -> Progress:
    if options.max_documents is not None:
        batch = batch.first(options.max_documents - before.num_documents)
    for problem in batch.problems:
        if options.on_error == "stop":
            raise DataError(
                f"{problem.place}: {problem.reason}. Nothing was written; correct the input, or leave such records out "
                "with --on-error skip."
            )
        skipped(f"{problem.place}: {problem.reason}")
    for key, writer in writers.items():
        writer.add_documents(batch.tokens[key], batch.lengths[key])
    return Progress(
        reader.position,
        reader.num_bytes,
        before.num_documents + batch.num_documents,
        sum(writer.num_tokens for writer in writers.values()),
        before.num_skipped + len(batch.problems),
    )
