"""Tokenizer files: the library reads from them the ids that the project trained with."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_moe.config.data import DataConfig
from megatron_moe.config.errors import DataError
from megatron_moe.convert.tokenizer import SAMPLES, TokenizerExport, from_sentencepiece, read_tokenizer
from megatron_moe.data.tokenizer import build_tokenizer

TEXT = "\n\n".join([*SAMPLES, Path(json.__file__).read_text(), Path(logging.__file__).read_text()[:40_000]])


def train(folder: Path, **options: Any) -> Path:
    """A SentencePiece model of a few hundred pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT[start : start + 1000] for start in range(0, len(TEXT), 1000)]),
        model_prefix=str(folder / "sp"),
        **{"vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options},
    )
    return folder / "sp.model"


def written(export: TokenizerExport, folder: Path) -> Any:
    """What the library loads from the files."""
    folder.mkdir()
    export.write(folder, max_length=512)
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def same_ids(data: DataConfig, folder: Path) -> Any:
    """The loaded tokenizer, after comparing its ids with the project's own tokenizer."""
    export = read_tokenizer(data)
    ours, theirs = build_tokenizer(data, None), written(export, folder)
    for text in (*SAMPLES, TEXT[:5000]):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
    assert export.vocab_size == ours.vocab_size
    assert export.id_of("eos_token") == ours.eod_id == theirs.eos_token_id
    assert theirs.model_max_length == 512
    return theirs


def data_config(kind: str, **files: Any) -> DataConfig:
    given: dict[str, Any] = {name: str(path) for name, path in files.items()}
    return DataConfig(seq_length=8, tokenizer_type=kind, **given)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False},
        {"normalization_rule_name": "identity", "user_defined_symbols": ["<|x|>"]},
        {"normalization_rule_name": "nmt_nfkc", "pad_id": 3, "vocab_size": 600},
        {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": False},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "unigram", "normalization_rule_name": "identity", "byte_fallback": False, "bos_id": -1},
    ],
)
def test_sentencepiece_ids_survive(options: dict[str, Any], tmp_path: Path) -> None:
    model = train(tmp_path, **options)
    theirs = same_ids(data_config("SentencePieceTokenizer", tokenizer_model=model), tmp_path / "hf")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in ("Hello world", "def f(x):\n    return x\n"):
        ids = processor.encode(text)
        assert theirs.decode(ids, skip_special_tokens=False) == processor.decode(ids)
    assert theirs.unk_token_id == processor.unk_id()
    assert theirs.pad_token_id == (3 if "pad_id" in options else None)
    assert theirs.bos_token_id == (None if "bos_id" in options else 1)
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("options", [{"model_type": "char"}, {"treat_whitespace_as_suffix": True}])
def test_a_model_that_tokenizers_has_nothing_for_is_only_copied(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export = from_sentencepiece(train(tmp_path, **options))
    assert export.tokenizer_json is None
    assert list(export.files) == ["tokenizer.model"]
    assert "no tokenizer.json is written" in caplog.text
    assert export.id_of("eos_token") == 2


def test_a_single_other_id_is_enough_to_only_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = train(tmp_path)
    # a special token spelt out in a text is plain text for SentencePiece only
    export = from_sentencepiece(model, samples=("fine", "a </s> b"))
    assert export.tokenizer_json is None
    assert "would give other ids for 'a </s> b'" in caplog.text


def test_config_names_the_generic_class_and_all_added_tokens(tmp_path: Path) -> None:
    written(from_sentencepiece(train(tmp_path, user_defined_symbols=["<|x|>"])), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    added = {number: token["content"] for number, token in config["added_tokens_decoder"].items()}
    assert added == {"0": "<unk>", "1": "<s>", "2": "</s>", "3": "<|x|>"} or added == {
        "1": "<s>",
        "2": "</s>",
        "3": "<|x|>",
    }
    told = json.loads((tmp_path / "hf" / "special_tokens_map.json").read_text())
    assert told == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_pair_files(folder: Path) -> tuple[Path, Path, Path]:
    """(tokenizer.json, vocab.json, merges.txt) of one small byte-level model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    return folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"


def test_a_tokenizer_json_goes_along_as_it_is(tmp_path: Path) -> None:
    file, _, _ = byte_pair_files(tmp_path)
    for number, given in enumerate((file, tmp_path)):
        same_ids(data_config("HuggingFaceTokenizer", tokenizer_model=given), tmp_path / f"hf{number}")
        assert (tmp_path / f"hf{number}" / "tokenizer.json").read_bytes() == file.read_bytes()


def test_special_tokens_come_from_the_file_beside_it(tmp_path: Path) -> None:
    file, _, _ = byte_pair_files(tmp_path)
    told = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "a", "pad_token": "absent from the vocabulary"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    export = read_tokenizer(data_config("HuggingFaceTokenizer", tokenizer_model=file))
    assert export.special["eos_token"] == ("<|endoftext|>", 0)
    assert "bos_token" in export.special
    assert "pad_token" not in export.special


def test_gpt2_files_become_one_file(tmp_path: Path) -> None:
    _, vocab, merges = byte_pair_files(tmp_path)
    same_ids(data_config("GPT2BPETokenizer", vocab_file=vocab, merge_file=merges), tmp_path / "hf")


def test_bytes_become_a_byte_level_tokenizer(tmp_path: Path) -> None:
    theirs = same_ids(data_config("ByteTokenizer"), tmp_path / "hf")
    assert theirs.decode(list("naïve 🙂".encode())) == "naïve 🙂"


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("SentencePieceTokenizer", {"tokenizer_model": "bad.model"}),
        ("HuggingFaceTokenizer", {"tokenizer_model": "bad.json"}),
        ("HuggingFaceTokenizer", {"tokenizer_model": "empty.json"}),
        ("GPT2BPETokenizer", {"vocab_file": "empty.json", "merge_file": "bad.model"}),
        ("SentencePieceTokenizer", {"tokenizer_model": "nowhere.model"}),
    ],
)
def test_broken_files_are_named(kind: str, files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"\x0a\xff\xff")
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "empty.json").write_text("{}")
    data = data_config(kind, **{name: tmp_path / file for name, file in files.items()})
    with pytest.raises(DataError, match=next(iter(files.values()))):
        read_tokenizer(data)
