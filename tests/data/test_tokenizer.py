"""Every kind of tokenizer: round trips, special tokens, fingerprints, and files that are not what they should be."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from megatron_moe.config.data import DataConfig
from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.data.byte_pair_encoding import byte_characters
from megatron_moe.data.tokenizer import (
    TOKENIZER_TYPES,
    ByteTokenizer,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerFiles,
    build_tokenizer,
    open_tokenizer,
)

TEXTS = ["hello world", "the quick brown fox", "tokens are numbers", "naïve café 12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small tokenizer of each kind that has files."""
    path = tmp_path_factory.mktemp("tokenizers")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, character_coverage=1.0,
    )  # fmt: skip
    (path / "spm.model").write_bytes(model.getvalue())
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<s>"],
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS * 5, trainer)
    (path / "hf").mkdir()
    trained.save(str(path / "hf/tokenizer.json"))
    model_json: Any = json.loads(trained.to_str())["model"]
    (path / "vocab.json").write_text(json.dumps(model_json["vocab"]))
    merges = [" ".join(pair) for pair in model_json["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return path


@pytest.fixture(params=TOKENIZER_TYPES)
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    files = {
        "SentencePieceTokenizer": TokenizerFiles("SentencePieceTokenizer", model=str(folder / "spm.model")),
        "HuggingFaceTokenizer": TokenizerFiles("HuggingFaceTokenizer", model=str(folder / "hf")),
        "GPT2BPETokenizer": TokenizerFiles(
            "GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt")
        ),
        "ByteTokenizer": TokenizerFiles("ByteTokenizer"),
        "NullTokenizer": TokenizerFiles("NullTokenizer", vocab_size=300),
    }
    return open_tokenizer(files[request.param])


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    texts = ["12 7 299", ""] if isinstance(tokenizer, NullTokenizer) else [*TEXTS, ""]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(type(number) is int and 0 <= number < tokenizer.vocab_size for number in ids)


def test_a_document_has_an_end(tokenizer: Tokenizer) -> None:
    assert tokenizer.eod_id is not None and 0 <= tokenizer.eod_id < tokenizer.vocab_size


def test_known_ids() -> None:
    assert ByteTokenizer().encode("aé") == [97, 0xC3, 0xA9]
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eod_id) == (257, 256)
    assert ByteTokenizer().decode([97, 256, 98]) == "ab"
    assert NullTokenizer(10).encode(" 3  9\n0 ") == [3, 9, 0]
    assert NullTokenizer(10).eod_id == 9


def test_special_ids_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    spm = SentencePieceTokenizer(folder / "spm.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    assert (spm.eod_id, spm.bos_id, spm.pad_id) == (processor.eos_id(), processor.bos_id(), None)
    assert HuggingFaceTokenizer(folder / "hf").eod_id == 0
    # tokenizer_config.json has the last word; a token may be an object
    (tmp_path / "tokenizer.json").write_bytes((folder / "hf/tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "<s>"}, "bos_token": "<s>", "pad_token": null}'
    )
    configured = HuggingFaceTokenizer(tmp_path)
    assert (configured.eod_id, configured.bos_id, configured.pad_id) == (1, 1, None)


def test_hugging_face_and_gpt2_files_of_one_tokenizer_agree(folder: Path) -> None:
    ours, theirs = GPT2BPETokenizer(folder / "vocab.json", folder / "merges.txt"), HuggingFaceTokenizer(folder / "hf")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.eod_id == theirs.eod_id and ours.vocab_size == theirs.vocab_size


def test_gpt2_does_not_take_spelt_out_special_tokens_for_special(folder: Path) -> None:
    tokenizer = GPT2BPETokenizer(folder / "vocab.json", folder / "merges.txt")
    assert tokenizer.eod_id not in tokenizer.encode("<|endoftext|>")


def test_fingerprints_are_stable_and_differ(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    assert len(tokenizer.fingerprint()) == 64 and int(tokenizer.fingerprint(), 16)
    assert NullTokenizer(10).fingerprint() != NullTokenizer(11).fingerprint()
    changed = tmp_path / "tokenizer.json"
    changed.write_text((folder / "hf/tokenizer.json").read_text() + "\n")
    assert HuggingFaceTokenizer(changed).fingerprint() != HuggingFaceTokenizer(folder / "hf").fingerprint()
    assert HuggingFaceTokenizer(folder / "hf").fingerprint() == HuggingFaceTokenizer(folder / "hf").fingerprint()


def test_gpt2_alphabet_is_part_of_every_vocabulary(folder: Path) -> None:
    assert set(byte_characters()) <= set(json.loads((folder / "vocab.json").read_text()))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (TokenizerFiles(None), "--tokenizer-type is missing; choose one of SentencePieceTokenizer"),
        (TokenizerFiles("BertTokenizer"), "'BertTokenizer' is unknown"),
        (TokenizerFiles("SentencePieceTokenizer"), "needs --tokenizer-model"),
        (TokenizerFiles("GPT2BPETokenizer", vocab_file="v"), "needs --merge-file"),
        (TokenizerFiles("NullTokenizer"), "needs --vocab-size"),
    ],
)
def test_missing_flags_are_named(files: TokenizerFiles, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_tokenizer(files)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"{}", b'{"model": 1}', b"\xff\xfe\x00" * 40])
def test_wrong_model_files_are_refused_by_name(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    with pytest.raises(DataError, match="no file .*model.json"):
        open_tokenizer(TokenizerFiles(kind, model=str(path)))
    path.write_bytes(content)
    with pytest.raises(DataError, match="model.json"):
        open_tokenizer(TokenizerFiles(kind, model=str(path)))


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("not json", "a b", "vocab.json is not valid JSON"),
        ("[1]", "a b", "must hold a JSON object"),
        ('{"a": "b"}', "a b", "must map each piece to its id"),
        ("{}", "a b", "must map each piece to its id"),
        ('{"a": 0}', "#version: 0.2\na b\n", "do not belong together"),
        ('{"a": 0}', "#version: 0.2\na b c\n", "merges.txt, line 2: expected two pieces"),
    ],
)
def test_wrong_gpt2_files_are_refused_by_name(vocabulary: str, merges: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(DataError, match=message):
        GPT2BPETokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")


@pytest.mark.parametrize(("text", "message"), [("1 x", "'x'"), ("1 10", "id 10 is outside 0..9"), ("-1", "id -1")])
def test_null_tokenizer_refuses_what_is_no_id(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        NullTokenizer(10).encode(text)


def test_a_run_opens_the_tokenizer_that_its_options_name(folder: Path) -> None:
    config = DataConfig(
        seq_length=8, tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "spm.model")
    )
    assert isinstance(build_tokenizer(config, None), SentencePieceTokenizer)
    assert build_tokenizer(DataConfig(seq_length=8, tokenizer_type="NullTokenizer"), 512).vocab_size == 512
