"""Tokenizers: text to ids and back, one class for each kind of file."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.data import DataConfig
from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.config.optional import require
from megatron_moe.data.byte_pair_encoding import BytePairEncoding

END_OF_TEXT = "<|endoftext|>"
# tried in this order when a tokenizer.json comes without tokenizer_config.json
USUAL_END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")


class Tokenizer(ABC):
    """Text to ids and back. `encode` adds no special tokens; the caller appends `eod_id` where a document ends."""

    vocab_size: int  # every id is below it
    num_sentinels: int = 0  # of its last ids, <extra_id_0> the very last: they stand for spans that are cut out (T5)
    eod_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None

    @property
    def text_size(self) -> int:
        """Ids of text: all but its own sentinels."""
        return self.vocab_size - self.num_sentinels

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what defines the ids: the files, or the options where there are none."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model file; its end of sentence is the end of a document."""

    def __init__(self, model: str | Path) -> None:
        self._files = [_existing(model, "--tokenizer-model")]
        library = require("sentencepiece", extra="data")
        content = self._files[0].read_bytes()
        try:
            if not content:
                # the library takes it for no model yet, without a word
                raise RuntimeError("it is empty")
            self._processor = library.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{model} is not a SentencePiece model ({error}); give the .model file.") from error
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = _at_least_zero(self._processor.eos_id())
        self.bos_id = _at_least_zero(self._processor.bos_id())
        self.pad_id = _at_least_zero(self._processor.pad_id())

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self._processor.encode(text, out_type=int))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self._processor.decode([int(number) for number in ids]))

    def fingerprint(self) -> str:
        """SHA-256 of the model file."""
        return _hash_files(self._files)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library, or the folder that holds it (and tokenizer_config.json)."""

    def __init__(self, path: str | Path) -> None:
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        self._files = [_existing(file, "--tokenizer-model")]
        library = require("tokenizers", extra="data")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for each kind of broken file
            raise DataError(f"{file} is not a tokenizer.json of the tokenizers library: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special = self._special_tokens(file.with_name("tokenizer_config.json"))
        self.eod_id = self._find(*special.get("eos_token", USUAL_END_TOKENS))
        self.bos_id = self._find(*special.get("bos_token", ()))
        self.pad_id = self._find(*special.get("pad_token", ()))
        while self._find(f"<extra_id_{self.num_sentinels}>") == self.vocab_size - 1 - self.num_sentinels:
            self.num_sentinels += 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens spelt out in it are recognised, as the library does."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=False))

    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json."""
        return _hash_files(self._files)

    def _special_tokens(self, file: Path) -> dict[str, tuple[str, ...]]:
        if not file.is_file():
            return {}
        config = _read_json(file)
        tokens = {name: config.get(name) for name in ("eos_token", "bos_token", "pad_token")}
        # older files write a token as {"content": "</s>", ...}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        return {name: (text,) for name, text in texts.items() if isinstance(text, str)}

    def _find(self, *names: str) -> int | None:
        found = (self._tokenizer.token_to_id(name) for name in names)
        return next((number for number in found if number is not None), None)


class GPT2BPETokenizer(Tokenizer):
    """GPT-2's vocab.json and merges.txt."""

    def __init__(self, vocab_file: str | Path, merge_file: str | Path) -> None:
        self._files = [_existing(vocab_file, "--vocab-file"), _existing(merge_file, "--merge-file")]
        vocabulary = _read_json(self._files[0])
        if any(not isinstance(number, int) or number < 0 for number in vocabulary.values()) or not vocabulary:
            raise DataError(f"{vocab_file} must map each piece to its id; give GPT-2's vocab.json.")
        try:
            self._encoding = BytePairEncoding(vocabulary, _read_merges(self._files[1]))
        except ValueError as error:
            raise DataError(f"{vocab_file} and {merge_file} do not belong together: {error}.") from error
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = vocabulary.get(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; "<|endoftext|>" spelt out in it is plain text."""
        return self._encoding.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._encoding.decode(int(number) for number in ids)

    def fingerprint(self) -> str:
        """SHA-256 of both files."""
        return _hash_files(self._files)


class ByteTokenizer(Tokenizer):
    """Each byte of the UTF-8 text is its id; 256 ends a document."""

    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; ends of documents are left out."""
        return bytes(int(number) for number in ids if number != self.eod_id).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """SHA-256 of the name."""
        return hashlib.sha256(b"ByteTokenizer").hexdigest()


class NullTokenizer(Tokenizer):
    """Text that is ids already: numbers with blanks between; the last id of the vocabulary ends a document."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod_id = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """The numbers of a text; DataError for anything else, and for ids outside the vocabulary."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"NullTokenizer reads ids with blanks between, but the text has a word that is none: {error}."
            ) from None
        bad = [number for number in ids if not 0 <= number < self.vocab_size]
        if bad:
            raise DataError(f"id {bad[0]} is outside 0..{self.vocab_size - 1}; raise --vocab-size or correct the text.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers with blanks between."""
        return " ".join(str(int(number)) for number in ids)

    def fingerprint(self) -> str:
        """SHA-256 of name and vocabulary size."""
        return hashlib.sha256(f"NullTokenizer {self.vocab_size}".encode()).hexdigest()


@dataclass(frozen=True)
class TokenizerFiles:
    """What --tokenizer-type and its neighbours name."""

    kind: str | None
    model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None


TOKENIZER_TYPES = {
    "SentencePieceTokenizer": ("model",),
    "HuggingFaceTokenizer": ("model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "ByteTokenizer": (),
    "NullTokenizer": ("vocab_size",),
}
FLAGS = {
    "model": "--tokenizer-model",
    "vocab_file": "--vocab-file",
    "merge_file": "--merge-file",
    "vocab_size": "--vocab-size",
}


def build_tokenizer(config: DataConfig, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of a run; `vocab_size` is the model's (only NullTokenizer needs it), sentinels included."""
    if vocab_size is not None and config.objective == "span_corruption":
        vocab_size -= config.vocab_extra_ids
    files = TokenizerFiles(
        config.tokenizer_type, config.tokenizer_model, config.vocab_file, config.merge_file, vocab_size
    )
    return open_tokenizer(files)


def open_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer that `files` name; ConfigError if a flag is missing, DataError if a file is not right."""
    if files.kind not in TOKENIZER_TYPES:
        given = "is missing" if files.kind is None else f"'{files.kind}' is unknown"
        raise ConfigError(f"--tokenizer-type {given}; choose one of {', '.join(TOKENIZER_TYPES)}.")
    values: list[Any] = [getattr(files, name) for name in TOKENIZER_TYPES[files.kind]]
    missing = [FLAGS[name] for name, value in zip(TOKENIZER_TYPES[files.kind], values, strict=True) if not value]
    if missing:
        raise ConfigError(f"--tokenizer-type {files.kind} needs {' and '.join(missing)}.")
    classes: dict[str, Any] = {
        "SentencePieceTokenizer": SentencePieceTokenizer,
        "HuggingFaceTokenizer": HuggingFaceTokenizer,
        "GPT2BPETokenizer": GPT2BPETokenizer,
        "ByteTokenizer": ByteTokenizer,
        "NullTokenizer": NullTokenizer,
    }
    tokenizer: Tokenizer = classes[files.kind](*values)
    return tokenizer


def _existing(path: str | Path, flag: str) -> Path:
    if not Path(path).is_file():
        raise DataError(f"{flag}: there is no file {path}; check the path, and on a cluster that every node sees it.")
    return Path(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy the tokenizer's files again.") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path} must hold a JSON object, not a {type(value).__name__}; check that it is the right file."
        )
    return value


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); give GPT-2's merges.txt.") from error
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version") or not line.strip():
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise DataError(f"{path}, line {number}: expected two pieces with a blank between, got {line!r}.")
        merges.append((parts[0], parts[1]))
    return merges


def _at_least_zero(number: int) -> int | None:
    return number if number >= 0 else None


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
