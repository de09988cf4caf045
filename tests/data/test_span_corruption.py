"""Span corruption against T5's published numbers and lists of tokens; prefix LM; samples from a corpus, resumed."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.span_lengths import corrupted_lengths, fits, raw_length
from megatron_moe.data.gpt_dataset import BlendedDataset, GPTDataset, TokenStream
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.data.objectives import PrefixOptions, SpanOptions
from megatron_moe.data.span_corruption import corrupt, noise_mask, spans_to_sentinels
from megatron_moe.parallel.random import KeyedRandom

END, START, VOCAB, SENTINELS = 1, 0, 1000, 20
RANDOM = KeyedRandom(3, stream="test")


@pytest.mark.parametrize(
    ("inputs", "density", "span", "raw", "targets"),
    [(512, 0.15, 3.0, 568, 114), (512, 0.5, 3.0, 766, 512), (114, 0.15, 3.0, 126, 26), (512, 0.15, 10.0, 591, 99)],
)
def test_lengths_are_those_of_t5(inputs: int, density: float, span: float, raw: int, targets: int) -> None:
    assert raw_length(inputs, density, span) == raw
    assert corrupted_lengths(raw, density, span) == (inputs, targets)


def test_the_sentence_of_the_paper() -> None:
    words = "Thank you for inviting me to your party last week".split()
    mask = np.array([word in ("for", "inviting", "last") for word in words])
    ids = np.arange(100, 100 + len(words))
    source, target = (spans_to_sentinels(ids, cut, 999) for cut in (mask, ~mask))
    names = {999: "<X>", 998: "<Y>", 997: "<Z>", **dict(zip(ids.tolist(), words, strict=True))}
    assert " ".join(names[i] for i in source.tolist()) == "Thank you <X> me to your party <Y> week"
    assert " ".join(names[i] for i in target.tolist()) == "<X> for inviting <Y> last <Z>"


def by_lists(tokens: Sequence[int], mask: Sequence[bool]) -> tuple[list[int], list[int]]:
    """One token after the other: input and target."""
    source: list[int] = []
    target: list[int] = []
    spans = [0, 0]
    before = None
    for token, noise in zip(tokens, mask, strict=True):
        own, other = (target, source) if noise else (source, target)
        if noise != before:
            other.append(VOCAB + SENTINELS - 1 - spans[noise])
            spans[noise] += 1
        own.append(token)
        before = noise
    return [*source, END], [*target, END]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    length=st.integers(2, 90),
    density=st.floats(0.05, 0.6),
    span=st.floats(1.0, 6.0),
    number=st.integers(0, 10**9),
)
def test_a_sample_is_cut_as_lists_are_and_can_be_put_together_again(
    length: int, density: float, span: float, number: int
) -> None:
    if not fits(length, density, span):
        with pytest.raises(ValueError, match="have no room"):
            noise_mask(length, density, span, RANDOM, number)
        return
    mask = noise_mask(length, density, span, RANDOM, number)
    runs = np.flatnonzero(np.diff(mask.astype(int))) + 1
    assert int(mask.sum()) == round(length * density)
    assert not mask[0] and mask[-1] and len(runs) + 1 == 2 * round(round(length * density) / span)
    tokens = np.arange(2, 2 + length)
    source, target = corrupt(tokens, mask, first_sentinel=VOCAB + SENTINELS - 1, end=END)
    assert (source.tolist(), target.tolist()) == by_lists(tokens.tolist(), mask.tolist())
    assert (len(source), len(target)) == corrupted_lengths(length, density, span)
    # each sentinel of the input is replaced by what follows it in the target
    spans: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token >= VOCAB - 100:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    whole = [word for token in source[:-1].tolist() for word in spans.get(token, [token])]
    assert whole == tokens.tolist() and len(spans) == (len(runs) + 1) // 2


def test_all_ways_of_cutting_are_equally_likely() -> None:
    # 6 tokens, 3 of them noise in 2 spans: 2 ways for the kept ones and 2 for the noise
    found = Counter(tuple(noise_mask(6, 0.5, 1.5, RANDOM, number).tolist()) for number in range(4000))
    assert len(found) == 4
    assert all(abs(count - 1000) < 150 for count in found.values())


def corpus(path: Path, documents: int = 7, words: int = 40) -> IndexedDataset:
    with IndexedDatasetWriter(path, dtype=np.dtype(np.uint16)) as writer:
        for number in range(documents):
            ids = list(range(2 + number * words, 2 + (number + 1) * words))
            writer.add_document(ids, [len(ids)])
        writer.finish()
    return IndexedDataset(path)


def span_options(inputs: int = 30) -> SpanOptions:
    return SpanOptions(
        seq_length=inputs,
        vocab_size=VOCAB,
        raw_length=raw_length(inputs, 0.15, 3.0),
        noise_density=0.15,
        mean_span=3.0,
        num_sentinels=SENTINELS,
        end_id=END,
        start_id=START,
    )


def span_dataset(path: Path, seed: int = 5) -> GPTDataset:
    read = corpus(path)
    return GPTDataset([TokenStream(read, range(7))], span_options(), seed=seed, name="train")


def test_a_batch_holds_what_was_cut_out_and_nothing_is_padded(tmp_path: Path) -> None:
    dataset = span_dataset(tmp_path / "corpus")
    raw = raw_length(30, 0.15, 3.0)
    assert dataset.num_samples == 280 // raw
    seen: list[int] = []
    for index in range(dataset.num_samples):
        batch = dataset.get([index])
        encoder, decoder = batch.encoder, batch.decoder
        assert encoder is not None and encoder.tokens.shape == (1, 30)
        assert decoder.labels.shape[1] == corrupted_lengths(raw, 0.15, 3.0)[1]
        assert not (encoder.segments.any() or decoder.segments.any()) and bool(decoder.loss_mask.all())
        assert decoder.tokens[0].tolist() == [START, *decoder.labels[0, :-1].tolist()]
        assert encoder.tokens[0, -1] == decoder.labels[0, -1] == END
        words = [*encoder.tokens[0].tolist(), *decoder.labels[0].tolist()]
        seen += [word for word in words if 2 <= word < VOCAB]
    # each token of the windows is in exactly one of the two, once an epoch
    assert sorted(seen) == list(range(2, 2 + dataset.num_samples * raw))


def test_a_sample_depends_on_its_number_only_and_each_epoch_cuts_anew(tmp_path: Path) -> None:
    dataset = span_dataset(tmp_path / "corpus")
    together, size = dataset.get([3, 11, 4]), dataset.num_samples
    for row, index in enumerate((3, 11, 4)):
        alone = span_dataset(tmp_path / f"again{row}").get([index])
        assert alone.encoder is not None and together.encoder is not None
        assert (alone.encoder.tokens[0] == together.encoder.tokens[row]).all()
        assert (alone.decoder.labels[0] == together.decoder.labels[row]).all()
    texts = {tuple(dataset.get([index]).decoder.labels[0].tolist()) for index in range(3 * size)}
    assert len(texts) > 2 * size
    other = span_dataset(tmp_path / "other", seed=6)
    assert any((other.get([i]).decoder.labels != dataset.get([i]).decoder.labels).any() for i in range(3))


def test_corpora_are_blended_as_for_a_decoder(tmp_path: Path) -> None:
    parts = [span_dataset(tmp_path / name) for name in ("a", "b")]
    blend = BlendedDataset(parts, [1.0, 3.0])
    assert blend.get([0, 1, 2, 3]).encoder is not None


def test_an_id_of_a_sentinel_in_the_corpus_is_refused(tmp_path: Path) -> None:
    read = corpus(tmp_path / "corpus")
    options = SpanOptions(**{**vars(span_options()), "vocab_size": 100})
    dataset = GPTDataset([TokenStream(read, range(7))], options, seed=1, name="train")
    with pytest.raises(Exception, match="the vocabulary ends at 99"):
        dataset.get(range(dataset.num_samples))


def prefix_dataset(path: Path, **changes: bool) -> GPTDataset:
    read = corpus(path, documents=12, words=7)
    options = PrefixOptions(seq_length=20, vocab_size=VOCAB, eod_id=END, **changes)
    return GPTDataset([TokenStream(read, range(12))], options, seed=5, name="train")


@pytest.mark.parametrize("documents", [False, True])
def test_a_prefix_begins_each_document_and_is_not_learnt(tmp_path: Path, documents: bool) -> None:
    dataset = prefix_dataset(tmp_path / "corpus", reset_attention_mask=documents)
    lengths = set()
    for index in range(40):
        sample = dataset.sample(index)
        assert sample.prefix is not None
        for document in range(int(sample.segments.max()) + 1):
            places = np.flatnonzero(sample.segments == document)
            inside = sample.prefix[places]
            count = int(inside.sum())
            assert inside[:count].all() and count < len(places)
            # what is learnt is each token after the prefix, and of the next document its first
            wanted = [place + 1 not in places[:count] for place in places]
            assert sample.loss_mask[places].tolist() == [float(one) for one in wanted]
            lengths.add(count / len(places))
    assert len(lengths) > 10 and min(lengths) < 0.2 and max(lengths) > 0.7
    batch = dataset.get([0, 1])
    assert batch.decoder.prefix is not None and batch.decoder.prefix.shape == (2, 20)
