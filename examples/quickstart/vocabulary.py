"""A SentencePiece tokenizer of the corpus, exact in both directions."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import sentencepiece


def _lines(documents: list[str], every: int) -> Iterator[str]:
    """One line in `every` of the lines that are not empty: the same sample at each call."""
    lines = (line for document in documents for line in document.split("\n") if line)
    return islice(lines, 0, None, every)


def train_tokenizer(documents: list[str], prefix: Path, vocab_size: int) -> Path:
    """Train byte-pair merges on a sample of the lines; returns the model file.

    Nothing is normalised, unknown characters fall back to bytes, and a line break is a piece of its own, so that
    decoding gives the text back exactly.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(documents, every=3),
        model_prefix=str(prefix),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        num_threads=2,
        minloglevel=2,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
    )
    return prefix.with_suffix(".model")


def check_round_trip(model: Path, documents: list[str]) -> float:
    """Bytes per token over some documents; raises ValueError if one does not come back exactly."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = size = 0
    for document in documents:
        ids = processor.encode(document)
        if processor.decode(ids) != document:
            raise ValueError(
                f"{model}: a document of {len(document)} characters does not survive encoding and decoding"
            )
        tokens += len(ids)
        size += len(document.encode())
    return size / tokens
