"""Windows of documents, against an oracle that concatenates lists; order, masks and what is refused."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.config.errors import DataError
from megatron_moe.data import indexed_dataset
from megatron_moe.data.gpt_dataset import BlendedDataset, GPTDataset, Sample, SampleOptions, TokenStream, read_sample
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.data.sampler import Sampler

EOD = 0


def write(prefix: Path, documents: list[list[list[int]]]) -> IndexedDataset:
    """Documents as lists of sequences."""
    with IndexedDatasetWriter(prefix, dtype=np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.add_document(list(chain.from_iterable(document)), [len(sequence) for sequence in document])
        writer.finish()
    return IndexedDataset(prefix)


def random_documents(seed: int, count: int, *, first: int = 1) -> list[list[list[int]]]:
    """Distinct tokens, so that each window is known by its content; some documents empty, some of several sequences."""
    draw = np.random.default_rng(seed)
    documents, token = [], first
    for _ in range(count):
        document = []
        for _ in range(draw.integers(0, 3)):
            length = int(draw.integers(1, 12))
            document.append(list(range(token, token + length)))
            token += length
        documents.append(document)
    return documents


def options(**changes: bool | int) -> SampleOptions:
    return SampleOptions(**{"seq_length": 8, "vocab_size": 60000, "eod_id": EOD, **changes})  # type: ignore[arg-type]


def oracle(documents: list[list[list[int]]], window: int, given: SampleOptions) -> Sample:
    """The slow way: all tokens in a list, each with the number of its document and its place in it."""
    flat = [(token, number) for number, document in enumerate(documents) for token in chain.from_iterable(document)]
    part = flat[window * given.seq_length : (window + 1) * given.seq_length + 1]
    tokens, numbers = [token for token, _ in part[:-1]], [number for _, number in part[:-1]]
    segments, positions = [0], [0]
    for before, here in zip(numbers, numbers[1:], strict=False):
        new = before != here
        segments.append(segments[-1] + new)
        positions.append(0 if new else positions[-1] + 1)
    mask = [0.0 if given.eod_mask_loss and token == EOD else 1.0 for token in tokens]
    return Sample(
        tokens=np.array(tokens),
        labels=np.array([token for token, _ in part[1:]]),
        loss_mask=np.array(mask, np.float32),
        position_ids=np.array(positions if given.reset_position_ids else range(given.seq_length)),
        segments=np.array(segments if given.reset_attention_mask else [0] * given.seq_length, np.int32),
    )


def assert_same(sample: Sample, expected: Sample) -> None:
    assert sample.prefix is None and sample.encoder is None
    for name, array in vars(expected).items():
        if array is None:
            continue
        found = getattr(sample, name)
        assert found.tolist() == array.tolist(), name
        assert found.dtype == array.dtype, name


@pytest.mark.parametrize("reset_position_ids", [False, True])
@pytest.mark.parametrize("reset_attention_mask", [False, True])
@pytest.mark.parametrize("seq_length", [1, 3, 8, 40])
@pytest.mark.parametrize("checked", [True, False])
def test_every_window_equals_concatenated_documents(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reset_position_ids: bool,
    reset_attention_mask: bool,
    seq_length: int,
    checked: bool,
) -> None:
    if not checked:
        monkeypatch.setattr(indexed_dataset, "CHECK_ON_OPEN", 0)
    documents = random_documents(1, 30)
    stream = TokenStream(write(tmp_path / "corpus", documents), range(len(list(chain.from_iterable(documents)))))
    given = options(
        seq_length=seq_length, reset_position_ids=reset_position_ids, reset_attention_mask=reset_attention_mask
    )
    dataset = GPTDataset([stream], given, seed=1, name="train")
    assert dataset.num_samples == (stream.num_tokens - 1) // seq_length
    for window in range(dataset.num_samples):
        assert_same(read_sample(stream, window, given), oracle(documents, window, given))


def test_a_hand_made_window(tmp_path: Path) -> None:
    # documents 11 12 0 | 21 0 | 31 32 33 0: the second window of 4 is 0 | 31 32 33, and 0 follows
    stream = TokenStream(write(tmp_path / "corpus", [[[11, 12, 0]], [[21, 0]], [[31, 32, 33, 0]]]), range(3))
    given = options(seq_length=4, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    sample = read_sample(stream, 1, given)
    assert sample.tokens.tolist() == [0, 31, 32, 33]
    assert sample.labels.tolist() == [31, 32, 33, 0]
    assert sample.loss_mask.tolist() == [0, 1, 1, 1]
    assert sample.position_ids.tolist() == [0, 0, 1, 2]
    assert sample.segments.tolist() == [0, 1, 1, 1]
    plain = read_sample(stream, 1, options(seq_length=4))
    assert plain.loss_mask.tolist() == [1, 1, 1, 1] and plain.position_ids.tolist() == [0, 1, 2, 3]
    assert plain.segments.tolist() == [0, 0, 0, 0]


def test_splits_share_no_token(tmp_path: Path) -> None:
    documents = [[list(range(100 * n, 100 * n + 10))] for n in range(6)]
    corpus = write(tmp_path / "corpus", documents)
    stream = TokenStream(corpus, range(2, 4))
    assert stream.num_tokens == 20
    assert stream.tokens(0, 20).tolist() == [*range(200, 210), *range(300, 310)]
    sample = read_sample(stream, 1, options(reset_attention_mask=True))
    assert sample.tokens.tolist() == [208, 209, 300, 301, 302, 303, 304, 305]
    assert sample.segments.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def first_tokens(dataset: BlendedDataset | GPTDataset, numbers: range) -> list[int]:
    return [int(dataset.sample(number).tokens[0]) for number in numbers]


def dataset_of(tmp_path: Path, name: str, tokens: int, *, first: int = 0, seed: int = 1) -> GPTDataset:
    corpus = write(tmp_path / name, [[list(range(first, first + tokens))]])
    return GPTDataset([TokenStream(corpus, range(1))], options(), seed=seed, name="train")


def test_an_epoch_holds_every_window_once_and_each_epoch_is_shuffled_anew(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, "corpus", 8 * 50 + 5)
    epochs = [first_tokens(dataset, range(50 * epoch, 50 * epoch + 50)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 400, 8))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(epoch != sorted(epoch) for epoch in epochs)


def test_the_seed_and_the_name_set_the_order(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", [[list(range(500))]])
    stream = TokenStream(corpus, range(1))
    orders = {
        tuple(first_tokens(GPTDataset([stream], options(), seed=seed, name=name), range(60)))
        for seed, name in [(1, "train"), (2, "train"), (1, "valid"), (1, "train")]
    }
    assert len(orders) == 3


def test_several_streams_are_one_epoch_together(tmp_path: Path) -> None:
    corpora = [write(tmp_path / f"{n}", [[list(range(1000 * n, 1000 * n + 8 * n + 9))]]) for n in (1, 2, 3)]
    dataset = GPTDataset([TokenStream(corpus, range(1)) for corpus in corpora], options(), seed=1, name="train")
    assert dataset.num_samples == 2 + 3 + 4
    expected = [1000, 1008, 2000, 2008, 2016, 3000, 3008, 3016, 3024]
    assert sorted(first_tokens(dataset, range(9))) == expected
    assert sorted(first_tokens(dataset, range(9, 18))) == expected


def test_a_blend_goes_through_each_dataset_in_its_own_order(tmp_path: Path) -> None:
    parts = [dataset_of(tmp_path, "a", 100), dataset_of(tmp_path, "b", 200, first=1000)]
    blend = BlendedDataset(parts, [3, 1])
    found = first_tokens(blend, range(400))
    assert Counter(token >= 1000 for token in found) == {False: 300, True: 100}
    assert [token for token in found if token < 1000] == first_tokens(parts[0], range(300))
    assert [token for token in found if token >= 1000] == first_tokens(parts[1], range(100))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_all_layouts_read_the_same_tokens_in_a_step(tmp_path: Path, dp_size: int, micro_batch_size: int) -> None:
    dataset = dataset_of(tmp_path, "corpus", 1000)
    rows: dict[int, list[int]] = {}
    for rank in range(dp_size):
        sampler = Sampler(
            global_batch_size=16, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size, consumed=160
        )
        for samples in sampler.microbatches():
            batch = dataset.get(samples)
            rows |= dict(zip(batch.sample_ids.tolist(), batch.decoder.tokens.tolist(), strict=True))
    assert rows == {number: dataset.sample(number).tokens.tolist() for number in range(160, 176)}


def test_batches_have_the_declared_types(tmp_path: Path) -> None:
    batch = dataset_of(tmp_path, "corpus", 100).get([5, 2, 9])
    assert batch.sample_ids.tolist() == [5, 2, 9]
    assert batch.encoder is None and batch.decoder.prefix is None
    tensors = {name: tensor for name, tensor in vars(batch.decoder).items() if tensor is not None}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    assert dtypes == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "segments": torch.int32,
    }
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(3, 8)}


def test_tokens_outside_the_vocabulary_never_reach_a_model(tmp_path: Path) -> None:
    stream = TokenStream(write(tmp_path / "corpus", [[[1] * 8 + [99]]]), range(1))
    assert read_sample(stream, 0, options(vocab_size=100)).labels[-1] == 99
    with pytest.raises(DataError, match=r"corpus\.bin holds token 99 as number 8 .*vocabulary ends at 98"):
        read_sample(stream, 0, options(vocab_size=99))
    dataset = GPTDataset([stream], options(vocab_size=99), seed=1, name="train")
    with pytest.raises(DataError, match=r"^sample 7 of the run: .*corpus\.bin holds token 99"):
        dataset.get([7])


def test_a_corpus_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="8 tokens, fewer than one sample .--seq-length 8"):
        dataset_of(tmp_path, "short", 8)
    assert dataset_of(tmp_path, "enough", 9).num_samples == 1


def test_a_damaged_large_index_is_noticed_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "corpus", [[[1] * 10] for _ in range(10)])
    path = tmp_path / "corpus.idx"
    content = bytearray(path.read_bytes())
    content[34 + 4 * 5] = 9  # the length of sequence 5
    path.write_bytes(content)
    monkeypatch.setattr(indexed_dataset, "CHECK_ON_OPEN", 0)
    stream = TokenStream(IndexedDataset(tmp_path / "corpus", use_hashes=False), range(10))
    given = options(seq_length=10, reset_attention_mask=True)
    read_sample(stream, 2, given)
    with pytest.raises(DataError, match="sequence 5 has 9 tokens"):
        read_sample(stream, 5, given)


def test_the_fingerprint_of_the_tokens_follows_them_and_needs_hashes_of_all(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1] * 20]])
    write(tmp_path / "b", [[[1] * 19 + [2]]])
    write(tmp_path / "bare", [[[1] * 20]])
    (tmp_path / "bare.hashes.json").unlink()
    a, again, b, bare = (
        GPTDataset([TokenStream(IndexedDataset(tmp_path / name), range(1))], options(), seed=1, name="train")
        for name in ("a", "a", "b", "bare")
    )
    # the index is the same, so that it alone cannot tell them apart
    assert a.fingerprint() == b.fingerprint()
    assert a.tokens_fingerprint() == again.tokens_fingerprint() != b.tokens_fingerprint()
    assert bare.tokens_fingerprint() is None and BlendedDataset([a, bare], [1, 1]).tokens_fingerprint() is None
    blends = [BlendedDataset(parts, [1, 1]).tokens_fingerprint() for parts in ([a, b], [b, a])]
    assert None not in blends and blends[0] != blends[1]


def test_the_fingerprint_follows_the_corpora(tmp_path: Path) -> None:
    a, b, c = (dataset_of(tmp_path, name, size) for name, size in [("a", 100), ("b", 101), ("c", 100)])
    assert a.fingerprint() == c.fingerprint() != b.fingerprint()
    assert BlendedDataset([a, b], [1, 1]).fingerprint() != BlendedDataset([b, a], [1, 1]).fingerprint()
