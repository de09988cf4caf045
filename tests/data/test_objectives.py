"""What a run reads for span corruption and prefix LM, from its options on, against lists; resumed, spread, blended."""

import itertools
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.span_lengths import corrupted_lengths, fits, raw_length
from megatron_moe.data.batch import Batch
from megatron_moe.data.build import build_datasets, vocabulary_size
from megatron_moe.data.gpt_dataset import BlendedDataset, Dataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.data.loader import Loader
from megatron_moe.data.permutation import Permutation
from megatron_moe.data.sampler import Sampler
from megatron_moe.data.tokenizer import HuggingFaceTokenizer, build_tokenizer
from megatron_moe.inference.sentinels import Sentinels
from tests.oracles import spans
from tests.oracles.draw import place

TEXT, EXTRA, SEED = 3000, 40, 77
END = TEXT - 1  # of NullTokenizer: the last id of the text
DOCUMENTS = [5, 1, 31, 2, 60, 17, 3, 200, 9, 44, 1, 1, 90]  # tokens, their end included


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """Corpora a and b: each token is another, but for the ends of documents."""
    for corpus, first in (("a", 10), ("b", 1500)):
        with IndexedDatasetWriter(tmp_path / corpus, dtype=np.dtype(np.uint16)) as writer:
            for number, length in enumerate(DOCUMENTS):
                start = first + sum(DOCUMENTS[:number])
                writer.add_document([*range(start, start + length - 1), END])
            writer.finish()
    return tmp_path


def run(*paths: Any, model: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    """Span corruption, unless `data` says another objective."""
    encoder = {"encoder_num_layers": 2} if data.get("objective", "span_corruption") == "span_corruption" else {}
    extra = {"vocab_extra_ids": EXTRA} if encoder else {}
    shape = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "position_embedding_type": "relative"}
    size = TEXT + (EXTRA if encoder else 0)
    return RunConfig.from_dict(
        {
            "model": {**shape, "vocab_size": size, **encoder, **(model or {})},
            "data": {
                "objective": "span_corruption",
                "seq_length": 24,
                "data_path": [str(path) for path in paths],
                "split": "100",
                **extra,
                **data,
            },
            "training": {"global_batch_size": 8, "train_iters": 10, "seed": SEED},
            "optimizer": {"lr": 1e-3},
        }
    )


def training_data(config: RunConfig) -> Dataset:
    found = build_datasets(config, build_tokenizer(config.data, config.model.vocab_size))["train"]
    assert found is not None
    return found


def windows(*firsts: int, length: int, shared: int) -> list[list[int]]:
    """All windows of corpora whose tokens begin at `firsts`, as lists."""
    found = []
    for first in firsts:
        stream = []
        for number, size in enumerate(DOCUMENTS):
            start = first + sum(DOCUMENTS[:number])
            stream += [*range(start, start + size - 1), END]
        found += [
            stream[at : at + length + shared] for at in range(0, len(stream) - shared, length)
            if at + length + shared <= len(stream)
        ]  # fmt: skip
    return found


def in_order(rows: list[list[int]], number: int) -> list[int]:
    """The window of sample `number`."""
    epoch, at = divmod(number, len(rows))
    return rows[Permutation(len(rows), key=place(SEED, epoch, "data/train", 0))(at)]


@pytest.mark.parametrize(
    ("inputs", "density", "mean_span"),
    [(24, 0.15, 3.0), (24, 0.4, 1.0), (31, 0.5, 3.0), (60, 0.3, 2.5), (10, 0.15, 3.0), (33, 0.25, 10.0)],
)
def test_every_sample_of_a_run_is_what_lists_give(corpora: Path, inputs: int, density: float, mean_span: float) -> None:
    noise = {"noise_density": density, "mean_noise_span_length": mean_span}
    dataset = training_data(run(corpora / "a", corpora / "b", seq_length=inputs, **noise))
    raw, targets = spans.lengths(inputs, density, mean_span)
    rows = windows(10, 1500, length=raw, shared=0)
    assert dataset.num_samples == len(rows)
    for number in range(2 * len(rows) + 3):
        text = in_order(rows, number)
        mask = spans.noise_mask(raw, density, mean_span, SEED, "train", number)
        source, target = spans.corrupted(text, mask, TEXT + EXTRA - 1, END)
        batch = dataset.get([number])
        encoder, decoder = batch.encoder, batch.decoder
        assert encoder is not None and batch.sample_ids.tolist() == [number]
        assert encoder.tokens.tolist() == [source] and len(source) == inputs
        assert decoder.labels.tolist() == [target] and len(target) == targets
        assert decoder.tokens.tolist() == [[END, *target[:-1]]]
        assert decoder.prefix is None and decoder.loss_mask.tolist() == [[1.0] * targets]
        for stream, length in ((encoder, inputs), (decoder, targets)):
            assert stream.position_ids.tolist() == [list(range(length))]
            assert stream.segments.tolist() == [[0] * length]


def test_no_input_is_longer_or_shorter_than_it_was_asked_for() -> None:
    for density, mean_span in [(0.15, 3.0), (0.5, 3.0), (0.5, 1.0), (0.5, 2.0), (0.25, 8.0), (0.7, 6.5), (0.02, 1.0)]:
        for inputs in range(3, 140):
            raw = raw_length(inputs, density, mean_span)
            if fits(raw, density, mean_span):
                found = corrupted_lengths(raw, density, mean_span)
                assert (raw, found[1]) == spans.lengths(inputs, density, mean_span)
                assert found[0] == inputs


def test_lengths_are_found_at_once_whatever_the_noise() -> None:
    assert corrupted_lengths(raw_length(512, 0.9999999, 1e7), 0.9999999, 1e7)[0] == 512


def test_the_numbers_of_t5_follow_from_its_options(corpora: Path) -> None:
    config = run(corpora / "a", seq_length=512)
    assert (config.data.decoder_length, config.data.tokens_of_a_sample) == (114, 626)
    with pytest.raises(DataError, match=r"464 tokens, fewer than one sample \(568 tokens for --seq-length 512\)"):
        training_data(config)


@pytest.mark.parametrize("flags", [{}, {"reset_attention_mask": True}, {"eod_mask_loss": True}])
def test_every_prefix_is_what_lists_give(corpora: Path, flags: dict[str, bool]) -> None:
    dataset = training_data(run(corpora / "a", corpora / "b", objective="prefix_lm", **flags))
    rows = windows(10, 1500, length=24, shared=1)
    causal = training_data(run(corpora / "a", corpora / "b", objective="causal", **flags))
    for number in range(2 * len(rows)):
        text, batch, plain = in_order(rows, number), dataset.get([number]), causal.get([number]).decoder
        decoder = batch.decoder
        assert batch.encoder is None and decoder.tokens.tolist() == [text[:-1]] and decoder.prefix is not None
        segments = decoder.segments[0].tolist()
        sizes = spans.prefix_lengths(segments, SEED, "train", number)
        begins = [segments.index(document) for document in segments]
        inside = [at - begins[at] < sizes[document] for at, document in enumerate(segments)]
        # a token whose successor belongs to the prefix of its document knows it already
        after = [inside[at + 1] and begins[at] == begins[at + 1] for at in range(23)] + [False]
        learnt = [0.0 if after[at] else plain.loss_mask[0, at].item() for at in range(24)]
        assert decoder.prefix[0].tolist() == inside
        assert decoder.loss_mask[0].tolist() == learnt
        for field in ("tokens", "labels", "position_ids", "segments"):
            assert (getattr(decoder, field) == getattr(plain, field)).all(), field


def test_every_length_of_a_prefix_is_as_likely_as_another(corpora: Path) -> None:
    dataset = training_data(run(corpora / "a", objective="prefix_lm", seq_length=8))
    prefixes = dataset.get(range(4000)).decoder.prefix
    assert prefixes is not None
    found = Counter(prefixes.sum(1).tolist())
    assert sorted(found) == list(range(8))
    assert all(abs(times - 500) < 100 for times in found.values())  # 5 standard deviations


def same(one: Batch, other: Batch) -> bool:
    if one.streams.keys() != other.streams.keys() or one.sample_ids.tolist() != other.sample_ids.tolist():
        return False
    return all(
        torch.equal(getattr(stream, field.name), getattr(other.streams[name], field.name))
        for name, stream in one.streams.items()
        for field in fields(stream)
        if getattr(stream, field.name) is not None
    )


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
@pytest.mark.parametrize("blended", [False, True])
def test_a_sample_is_the_same_on_every_rank_by_any_thread_and_after_resuming(
    corpora: Path, objective: str, blended: bool
) -> None:
    paths = (0.3, corpora / "a", 0.7, corpora / "b") if blended else (corpora / "a", corpora / "b")
    noise = {"noise_density": 0.4} if objective == "span_corruption" else {}
    config = run(*paths, objective=objective, **noise)
    alone = {number: training_data(config).get([number]) for number in range(48)}
    assert len({str(batch.decoder.tokens.tolist()) for batch in alone.values()}) > 30
    for dp_size, micro, workers in itertools.product((1, 2, 4), (1, 2), (0, 2)):
        for rank in range(dp_size):
            sampler = Sampler(global_batch_size=8, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size, consumed=16)
            with Loader(training_data(config), sampler, num_workers=workers) as loader:
                for batch in itertools.chain.from_iterable(itertools.islice(loader, 4)):
                    for row, number in enumerate(batch.sample_ids.tolist()):
                        assert same(batch.rows(row, row + 1), alone[number])
                assert loader.state_dict() == {"consumed_samples": 48}


def test_the_parts_of_a_blend_are_cut_independently(corpora: Path) -> None:
    config = run(0.5, corpora / "a", 0.5, corpora / "a", noise_density=0.4)
    dataset = training_data(config)
    assert isinstance(dataset, BlendedDataset)
    raw = raw_length(24, 0.4, 3.0)
    sentinels: list[list[bool]] = []
    for part, number in itertools.product((0, 1), range(12)):
        encoder = dataset.datasets[part].get([number]).encoder
        assert encoder is not None
        mask = spans.noise_mask(raw, 0.4, 3.0, SEED, f"train/{part}", number)
        kept, _ = spans.corrupted([0] * raw, mask, TEXT + EXTRA - 1, 0)
        sentinels.append((encoder.tokens[0] >= TEXT).tolist())
        assert sentinels[-1] == [token >= TEXT for token in kept]
    assert sentinels[:12] != sentinels[12:]


def test_sentinels_come_after_the_text_and_never_meet_it(corpora: Path) -> None:
    config = run(corpora / "a")
    assert vocabulary_size(config, build_tokenizer(config.data, config.model.vocab_size)) == TEXT + EXTRA
    # the corpus holds the id that would be a sentinel's: named, not trained on
    narrow = run(corpora / "a", model={"vocab_size": TEXT - 1 + EXTRA})
    with pytest.raises(DataError, match="holds token 2999 .*but the vocabulary ends at 2998"):
        training_data(narrow).get(range(20))
    bytes_ = run(corpora / "a", tokenizer_type="ByteTokenizer", model={"vocab_size": None})
    assert vocabulary_size(bytes_, build_tokenizer(bytes_.data, None)) == 257 + EXTRA
    short = run(corpora / "a", tokenizer_type="ByteTokenizer", model={"vocab_size": 257 + EXTRA - 1})
    with pytest.raises(ConfigError, match="--vocab-size 296 is smaller than the tokenizer's 297 and --vocab-extra-ids"):
        training_data(short)


def t5_tokenizer(folder: Path, sentinels: int) -> Path:
    """A tokenizer.json with words, </s>, and <extra_id_0> as the last id, as T5's."""
    pieces = ["<pad>", "</s>", "<unk>", "one", "two"]
    special = [f"<extra_id_{number}>" for number in reversed(range(sentinels))]
    added = [
        {"id": len(pieces) + at, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for at, text in enumerate(special)
    ]
    model = {"type": "WordLevel", "vocab": {piece: at for at, piece in enumerate(pieces)}, "unk_token": "<unk>"}
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    return file


def test_the_sentinels_that_a_tokenizer_has_are_the_ones_that_are_used(corpora: Path) -> None:
    file = t5_tokenizer(corpora, EXTRA)
    tokenizer = HuggingFaceTokenizer(file)
    assert (tokenizer.vocab_size, tokenizer.num_sentinels) == (5 + EXTRA, EXTRA)
    with IndexedDatasetWriter(corpora / "words", dtype=np.dtype(np.uint16)) as writer:
        writer.add_document([3, 4] * 40)
        writer.finish()
    given = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(file)}
    config = run(corpora / "words", model={"vocab_size": None}, **given)
    assert vocabulary_size(config, tokenizer) == 5 + EXTRA
    batch = training_data(config).get([0])
    # T5 begins with its padding token; <extra_id_0> opens the target
    assert batch.decoder.tokens[0, 0] == 0 and batch.decoder.labels[0, -1] == 1
    assert batch.decoder.labels[0, 0] == 5 + EXTRA - 1 == tokenizer.encode("<extra_id_0>")[0]
    assert Sentinels(tokenizer, EXTRA).encode("<extra_id_3>") == [5 + EXTRA - 4, 1]
    assert Sentinels(tokenizer, EXTRA).decode([5 + EXTRA - 4]) == "<extra_id_3>"
    other = run(corpora / "words", model={"vocab_size": None}, **{**given, "vocab_extra_ids": 30})
    with pytest.raises(ConfigError, match=r"has 40 sentinels already, <extra_id_0> to <extra_id_39>; give .*-ids 40"):
        training_data(other)


def test_a_run_without_a_place_for_its_sentinels_is_refused(corpora: Path) -> None:
    with pytest.raises(ConfigError, match="--vocab-size 40 leaves no id to the text beside the sentinels"):
        run(corpora / "a", model={"vocab_size": EXTRA})
    endless = build_tokenizer(run(corpora / "a").data, TEXT + EXTRA)
    endless.eod_id = None
    with pytest.raises(ConfigError, match="--objective span_corruption closes each sequence"):
        build_datasets(run(corpora / "a"), endless)


@pytest.mark.parametrize("objective", ["causal", "prefix_lm"])
def test_an_encoder_without_anything_to_read_is_refused(corpora: Path, objective: str) -> None:
    config = run(corpora / "a", objective=objective, model={"encoder_num_layers": 2})
    with pytest.raises(ConfigError, match=f"--objective {objective} gives --encoder-num-layers 2 nothing to read"):
        training_data(config)
