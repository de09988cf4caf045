"""A SentencePiece model file as a tokenizer.json of the `tokenizers` library, for BPE and unigram models.

The file is a protocol buffer; the few fields that are needed are read here, so that no protobuf package is.
Field numbers: google/sentencepiece, src/sentencepiece_model.proto. Merges from scores: as in Hugging Face's converters.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.errors import DataError
from megatron_moe.config.optional import require

BLANK = "\u2581"  # what SentencePiece writes for a space
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

Field = tuple[int, int | bytes]


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What of the file decides the ids of a text."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    blank_at_end: bool
    charsmap: bytes
    dummy_prefix: bool
    trims: bool


def parse_model(data: bytes, source: str) -> SentencePieceModel:
    """Read the file's bytes; DataError if they are no SentencePiece model."""
    try:
        top = list(_fields(data))
        trainer = dict(_fields(_last(top, 2)))
        normalizer = dict(_fields(_last(top, 3)))
        pieces = tuple(_piece(value) for number, value in top if number == 1 and isinstance(value, bytes))
    except (IndexError, ValueError, struct.error) as error:
        raise DataError(f"{source} is not a SentencePiece model ({error}); give the .model file.") from error
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        pieces=pieces,
        model_type=_number(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        blank_at_end=bool(trainer.get(24, 0)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        dummy_prefix=bool(normalizer.get(3, 1)),
        trims=bool(normalizer.get(4, 1)),
    )


def to_tokenizer(model: SentencePieceModel) -> Any | None:
    """A tokenizers.Tokenizer that should give the same ids; None for kinds of model that it has nothing for.

    Whoever uses it compares the ids: normalisation tables and ties between merges are where the two can differ.
    """
    if model.model_type not in (UNIGRAM, BPE) or model.blank_at_end or not model.pieces:
        return None
    library = require("tokenizers", extra="data")
    tokenizer = library.Tokenizer(_unigram(model, library) if model.model_type == UNIGRAM else _bpe(model, library))
    tokenizer.normalizer = _normalizer(model, library.normalizers)
    tokenizer.decoder = _decoder(model, library.decoders)
    added = [piece for piece in model.pieces if piece.kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens(
        [library.AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL) for piece in added]
    )
    return tokenizer


def _bpe(model: SentencePieceModel, library: Any) -> Any:
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    return library.models.BPE(
        vocab=ids, merges=_merges(model, ids), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
    )


def _unigram(model: SentencePieceModel, library: Any) -> Any:
    unknown = next((number for number, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    return library.models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback)


def _merges(model: SentencePieceModel, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best-scored piece first."""
    mergeable = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for piece in model.pieces:
        if piece.kind != NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in mergeable and right in mergeable:
                found.append((-piece.score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizer(model: SentencePieceModel, library: Any) -> Any:
    steps = [library.Precompiled(model.charsmap)] if model.charsmap else []
    if model.trims:
        regex = require("tokenizers", extra="data").Regex
        # spaces only: Strip would take line ends too
        steps += [library.Replace(regex(r"\A +| +\z"), ""), library.Replace(regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(library.Prepend(BLANK))
    steps.append(library.Replace(" ", BLANK))
    return library.Sequence(steps)


def _decoder(model: SentencePieceModel, library: Any) -> Any:
    steps = [library.Replace(BLANK, " "), library.ByteFallback(), library.Fuse()]
    if model.dummy_prefix:
        steps.append(library.Strip(content=" ", left=1, right=0))
    return library.Sequence(steps)


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score = fields.get(1, b""), fields.get(2, bytes(4))
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece of another form")
    return Piece(text.decode(), struct.unpack("<f", score)[0], _number(fields.get(3, NORMAL)))


def _last(fields: list[Field], number: int) -> bytes:
    found = [value for key, value in fields if key == number]
    if not found or not isinstance(found[-1], bytes):
        raise ValueError(f"field {number} is missing")
    return found[-1]


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value


def _fields(data: bytes) -> Iterator[Field]:
    """(field number, value) of a message: an int for a varint, bytes for anything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value: int | bytes
            value, position = _varint(data, position)
        elif wire in (1, 2, 5):
            if wire == 2:
                length, position = _varint(data, position)
            else:
                length = 8 if wire == 1 else 4
            value = data[position : position + length]
            if len(value) != length:
                raise ValueError("it ends too early")
            position += length
        else:
            raise ValueError(f"wire type {wire}")
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number that is too long")
