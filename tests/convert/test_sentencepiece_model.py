"""Reading a SentencePiece file without protobuf: the library's vocabulary, and no crash on other bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings, strategies

from megatron_moe.config.errors import DataError
from megatron_moe.convert.sentencepiece_model import BPE, CONTROL, UNIGRAM, UNKNOWN, USER_DEFINED, parse_model


@pytest.mark.parametrize(("kind", "number"), [("bpe", BPE), ("unigram", UNIGRAM)])
def test_pieces_scores_and_switches_are_those_of_the_library(kind: str, number: int, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog " * 3] * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        model_type=kind,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=True,
        normalization_rule_name="identity",
        user_defined_symbols=["<x>"],
        minloglevel=2,
    )
    path = tmp_path / "m.model"
    model = parse_model(path.read_bytes(), str(path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [piece.text for piece in model.pieces] == [library.id_to_piece(i) for i in range(len(library))]
    assert [piece.score for piece in model.pieces] == [library.get_score(i) for i in range(len(library))]
    assert [piece.kind for piece in model.pieces[:4]] == [UNKNOWN, CONTROL, CONTROL, USER_DEFINED]
    assert (model.model_type, model.byte_fallback, model.dummy_prefix, model.trims) == (number, False, False, True)
    assert (model.charsmap, model.blank_at_end) == (b"", False)


@settings(max_examples=200, deadline=None)
@given(strategies.binary(max_size=60))
def test_other_bytes_are_refused_in_words(data: bytes) -> None:
    try:
        parse_model(data, "some.model")
    except DataError as error:
        assert str(error).startswith("some.model is not a SentencePiece model")
