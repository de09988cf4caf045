"""Samples for a decoder: windows of a token stream, in an order that is computed and never stored.

    documents    |  a  a  a | b  b | c  c  c  c  c | d  d  d |      one stream, as it lies in .bin
    windows      [ 0           ][ 1           ][ 2         ]       seq_length + 1 tokens, the last shared with the next

Sample i of epoch e is window P(i), P a permutation keyed by (seed, e): each window once in an epoch. Tokens after the
last whole window are not used. Opening costs the same for any corpus, and a run goes on from any sample at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import xxhash

from megatron_moe.config.errors import DataError
from megatron_moe.data.batch import Batch, Stream
from megatron_moe.data.blend import Blend
from megatron_moe.data.indexed_dataset import IndexedDataset, IntArray
from megatron_moe.data.permutation import Permutation
from megatron_moe.parallel.random import KeyedRandom


@dataclass(frozen=True)
class Sample:
    """One training example, each array (S,)."""

    tokens: IntArray  # int64
    labels: IntArray  # int64
    loss_mask: np.ndarray[Any, np.dtype[np.float32]]
    position_ids: IntArray  # int64
    segments: IntArray  # int32


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How a window becomes a sample."""

    seq_length: int
    vocab_size: int  # ids from here on are refused
    eod_id: int | None = None
    reset_position_ids: bool = False  # positions start again at each document
    reset_attention_mask: bool = False  # documents of a sample become segments
    eod_mask_loss: bool = False  # what follows an end of document is not learnt


class TokenStream:
    """The sequences of one split of a corpus, read as one stream of tokens."""

    def __init__(self, corpus: IndexedDataset, sequences: range) -> None:
        self.corpus = corpus
        self._start = corpus.first_token(sequences.start)
        self.num_tokens = corpus.first_token(sequences.stop) - self._start if sequences else 0

    def tokens(self, start: int, stop: int) -> IntArray:
        """Tokens start..stop-1 of the stream, as stored."""
        return self.corpus.tokens(self._start + start, self._start + stop)

    def document_starts(self, start: int, stop: int) -> IntArray:
        """Where documents begin strictly between `start` and `stop`, from `start` on; reads O(log corpus) entries."""
        corpus, size = self.corpus, self.corpus.dtype.itemsize
        begin, end = self._start + start, self._start + stop
        first = bisect_right(corpus.pointers, begin * size)  # the first sequence that starts later
        last = bisect_left(corpus.pointers, end * size)
        if not corpus.verified:
            corpus.verify_sequences(max(first - 1, 0), last)
        numbers = corpus.boundaries[bisect_left(corpus.boundaries, first) : bisect_left(corpus.boundaries, last)]
        # a document without tokens starts where the next one does
        return np.unique(corpus.pointers[numbers] // size - begin)


class Dataset(ABC):
    """Samples by their number in the run: endless, the same on every rank, each computed when asked for."""

    num_samples: int  # of one epoch

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """The sample with this number (0, 1, ... through all epochs)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when any corpus below does; kept in checkpoints. Reads the whole index: ask once."""

    def get(self, indices: Sequence[int]) -> Batch:
        """These samples as one microbatch."""
        samples = [self.sample(index) for index in indices]
        arrays = {field.name: np.stack([getattr(sample, field.name) for sample in samples]) for field in fields(Sample)}
        stream = Stream(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        return Batch(streams={"decoder": stream}, sample_ids=torch.tensor(list(indices), dtype=torch.int64))


class GPTDataset(Dataset):
    """Shuffled windows of one stream, or of several together, each window once an epoch.

    `name` separates the orders of datasets with one seed. Raises DataError if a stream is too short for one window.
    """

    def __init__(self, streams: Sequence[TokenStream], options: SampleOptions, *, seed: int, name: str) -> None:
        self.streams, self.options = tuple(streams), options
        sizes = [num_windows(stream, options.seq_length) for stream in streams]
        for stream, size in zip(streams, sizes, strict=True):
            if not size:
                raise DataError(
                    f"{stream.corpus.prefix}: the {name} split has {stream.num_tokens} tokens, fewer than one sample "
                    f"(--seq-length {options.seq_length} + 1); shorten --seq-length, change --split or add text."
                )
        self._ends = list(accumulate(sizes))
        self.num_samples = self._ends[-1]
        self._random = KeyedRandom(seed, stream=f"data/{name}")
        self._permutation = lru_cache(maxsize=4)(self._make_permutation)

    def sample(self, index: int) -> Sample:
        """Window number P(index modulo epoch) of all streams."""
        epoch, position = divmod(index, self.num_samples)
        window = self._permutation(epoch)(position)
        number = bisect_right(self._ends, window)
        before = self._ends[number - 1] if number else 0
        return read_sample(self.streams[number], window - before, self.options)

    def fingerprint(self) -> str:
        """A hash of the fingerprints of the corpora."""
        return _combine([stream.corpus.fingerprint() for stream in self.streams])

    def _make_permutation(self, epoch: int) -> Permutation:
        return Permutation(self.num_samples, key=self._random.at(step=epoch).key())


class BlendedDataset(Dataset):
    """Several datasets in fixed proportions; each goes through its own epochs."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        self.datasets = tuple(datasets)
        self.num_samples = sum(dataset.num_samples for dataset in datasets)
        self._blend = Blend(weights)

    def sample(self, index: int) -> Sample:
        """The next sample of the dataset whose turn it is."""
        place = self._blend.locate(index)
        return self.datasets[place.dataset].sample(place.index)

    def fingerprint(self) -> str:
        """A hash of the fingerprints of the parts."""
        return _combine([dataset.fingerprint() for dataset in self.datasets])


def num_windows(stream: TokenStream, seq_length: int) -> int:
    """Whole windows in a stream: the last token of each is the first of the next."""
    return max(stream.num_tokens - 1, 0) // seq_length


def read_sample(stream: TokenStream, window: int, options: SampleOptions) -> Sample:
    """Window number `window` of the stream, as the options want it.  [masks: Megatron core/datasets/gpt_dataset.py]"""
    length = options.seq_length
    start = window * length
    values = stream.tokens(start, start + length + 1).astype(np.int64)
    if int(values.max()) >= options.vocab_size or int(values.min()) < 0:
        bad = int(values.max()) if int(values.max()) >= options.vocab_size else int(values.min())
        raise DataError(
            f"{stream.corpus.bin_path} holds token {bad}, but the vocabulary ends at {options.vocab_size - 1}: "
            "the corpus was made with another tokenizer, or is damaged. Name the tokenizer that it was made with."
        )
    tokens = values[:-1]
    positions = np.arange(length, dtype=np.int64)
    segments = np.zeros(length, np.int32)
    if options.reset_position_ids or options.reset_attention_mask:
        starts = stream.document_starts(start, start + length)
        documents = np.searchsorted(starts, positions, side="right")
        if options.reset_attention_mask:
            segments = documents.astype(np.int32)
        if options.reset_position_ids:
            positions = positions - np.concatenate([[0], starts])[documents]
    loss_mask = np.ones(length, np.float32)
    if options.eod_mask_loss:
        loss_mask[tokens == options.eod_id] = 0.0
    return Sample(tokens=tokens, labels=values[1:], loss_mask=loss_mask, position_ids=positions, segments=segments)


def _combine(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else xxhash.xxh3_128_hexdigest("\n".join(parts).encode())
