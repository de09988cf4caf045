"""The datasets of a run: splits, blends, options against the tokenizer."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goals import Trials

from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.build import build_datasets
from megatron_moe.data.gpt_dataset import BlendedDataset, Dataset, GPTDataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.data.tokenizer import ByteTokenizer, NullTokenizer


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """Corpora a and b of 100 documents of 10 tokens; a token tells its corpus and its document."""
    for corpus, first in (("a", 0), ("b", 100)):
        with IndexedDatasetWriter(tmp_path / corpus, dtype=np.dtype(np.uint16)) as writer:
            for number in range(100):
                writer.add_document([first + number] * 9 + [255])
            writer.finish()
    return tmp_path


def config(*data_path: object, model: dict[str, Any] | None = None, seed: int = 1234, **data: Any) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 257, **(model or {})},
            "data": {"seq_length": 8, "data_path": [str(part) for part in data_path], "tokenizer_type": "ByteTokenizer"}
            | data,
            "training": {"global_batch_size": 4, "train_iters": 10, "seed": seed},
            "optimizer": {"lr": 1e-3},
        }
    )


def seen(dataset: Dataset | None) -> set[int]:
    assert dataset is not None
    return {int(token) for number in range(dataset.num_samples) for token in dataset.sample(number).tokens} - {255}


def test_splits_are_documents_of_their_own(corpora: Path) -> None:
    datasets = build_datasets(config(corpora / "a", split="80,15,5"), ByteTokenizer())
    assert seen(datasets["train"]) == set(range(80))
    assert seen(datasets["valid"]) == set(range(80, 95))
    assert seen(datasets["test"]) == set(range(95, 100))
    train = datasets["train"]
    assert isinstance(train, GPTDataset) and train.num_samples == (800 - 1) // 8


def test_a_weighted_blend_keeps_its_proportions(corpora: Path) -> None:
    datasets = build_datasets(config(0.75, corpora / "a", 0.25, corpora / "b", split="90,10,0"), ByteTokenizer())
    assert isinstance(datasets["train"], BlendedDataset)
    firsts = [int(datasets["train"].sample(number).tokens[1]) for number in range(400)]
    assert sum(100 <= token < 255 for token in firsts) == pytest.approx(100, abs=30)
    assert datasets["test"] is None


def test_prefixes_without_weights_are_one_corpus(corpora: Path) -> None:
    datasets = build_datasets(config(corpora / "a", corpora / "b", split="100"), ByteTokenizer())
    assert isinstance(datasets["train"], GPTDataset)
    assert datasets["train"].num_samples == 2 * ((1000 - 1) // 8)
    assert seen(datasets["train"]) == set(range(200))
    assert datasets["valid"] is None and datasets["test"] is None


def test_the_options_of_the_run_reach_the_samples(corpora: Path) -> None:
    flags = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    # the end of a document is 255 here
    datasets = build_datasets(
        config(corpora / "a", tokenizer_type="NullTokenizer", model={"vocab_size": 256}, **flags), NullTokenizer(256)
    )
    train = datasets["train"]
    assert train is not None
    samples = [train.sample(number) for number in range(train.num_samples)]
    assert any(sample.segments.max() > 0 for sample in samples)
    assert any((np.diff(sample.position_ids) < 0).any() for sample in samples)
    assert all(((sample.loss_mask == 0) == (sample.tokens == 255)).all() for sample in samples)


def test_the_seed_of_the_run_sets_the_order(corpora: Path) -> None:
    orders = []
    for seed in (1, 2, 1):
        train = build_datasets(config(corpora / "a", seed=seed), ByteTokenizer())["train"]
        assert train is not None
        orders.append(train.get(range(20)).decoder.tokens.tolist())
    assert orders[0] == orders[2] != orders[1]


def test_a_split_too_short_for_a_sample_is_left_out_aloud(corpora: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        datasets = build_datasets(config(corpora / "a", split="97,2,1", seq_length=15), ByteTokenizer())
    assert datasets["valid"] is not None and datasets["test"] is None
    assert "the test split has 10 tokens, fewer than one sample, and is left out" in caplog.text
    with pytest.raises(DataError, match="the train split has 10 tokens"):
        build_datasets(config(corpora / "a", split="1,99", seq_length=15), ByteTokenizer())


def test_options_that_contradict_the_tokenizer_are_refused(corpora: Path) -> None:
    with pytest.raises(ConfigError, match="--vocab-size 200 is smaller than the tokenizer's 257"):
        build_datasets(config(corpora / "a", model={"vocab_size": 200}), ByteTokenizer())
    endless = ByteTokenizer()
    endless.eod_id = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="--eod-mask-loss needs"):
        build_datasets(config(corpora / "a", eod_mask_loss=True), endless)
    with pytest.raises(ConfigError, match="--data-path is empty"):
        build_datasets(config(), ByteTokenizer())
    with pytest.raises(DataError, match="no corpus at"):
        build_datasets(config(corpora / "missing"), ByteTokenizer())


@pytest.mark.goal("R31", ci=1, nightly=1, what="a corpus of another tokenizer: refused, with both fingerprints")
def test_a_corpus_of_another_tokenizer_is_refused(corpora: Path, tmp_path: Path, trials: Trials) -> None:
    for name, made in (("bytes", ByteTokenizer().fingerprint()), ("other", "f" * 64)):
        with IndexedDatasetWriter(tmp_path / name, dtype=np.dtype(np.uint16), tokenizer=made) as writer:
            writer.add_document(np.arange(200))
            writer.finish()
    assert build_datasets(config(tmp_path / "bytes", corpora / "a"), ByteTokenizer())["train"] is not None
    with pytest.raises(ConfigError, match=f"{ByteTokenizer().fingerprint()}, but .*/other: {'f' * 64}\\); give the"):
        build_datasets(config(tmp_path / "bytes", tmp_path / "other"), ByteTokenizer())
    # ids without a meaning, and unread hashes
    assert build_datasets(config(tmp_path / "other"), NullTokenizer(257))["train"] is not None
    assert build_datasets(config(tmp_path / "other", verify_data="off"), ByteTokenizer())["train"] is not None
    trials.add(1)
