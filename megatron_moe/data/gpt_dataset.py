"""Samples from windows of a token stream, in an order that is computed and never stored.

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
from megatron_moe.data.batch import Batch, Inputs, Stream
from megatron_moe.data.blend import Blend
from megatron_moe.data.indexed_dataset import IndexedDataset, IntArray
from megatron_moe.data.permutation import Permutation
from megatron_moe.parallel.random import KeyedRandom


@dataclass(frozen=True)
class InputSample:
    """What a model reads of one example, each array (S,)."""

    tokens: IntArray  # int64
    position_ids: IntArray  # int64
    segments: IntArray  # int32

    @classmethod
    def of_one_document(cls, tokens: IntArray) -> InputSample:
        return cls(tokens, np.arange(len(tokens), dtype=np.int64), np.zeros(len(tokens), np.int32))


@dataclass(frozen=True, kw_only=True)
class Sample(InputSample):
    """One training example."""

    labels: IntArray  # int64
    loss_mask: np.ndarray[Any, np.dtype[np.float32]]
    prefix: np.ndarray[Any, np.dtype[np.bool_]] | None = None  # tokens that all of their document see
    encoder: InputSample | None = None  # what the encoder reads


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How a window becomes a sample."""

    seq_length: int
    vocab_size: int  # ids from here on are refused
    eod_id: int | None = None
    reset_position_ids: bool = False  # positions start again at each document
    reset_attention_mask: bool = False  # documents of a sample become segments
    eod_mask_loss: bool = False  # what follows an end of document is not learnt

    @property
    def window(self) -> int:
        """Tokens from the start of one window to the start of the next."""
        return self.seq_length

    @property
    def window_words(self) -> str:
        """How long a window is, in the words of the command line."""
        return f"--seq-length {self.seq_length} + 1"

    @property
    def shared(self) -> int:
        """Tokens at the end of a window that also begin the next."""
        return 1

    def read(self, stream: TokenStream, window: int, random: KeyedRandom, number: int) -> Sample:
        """Window number `window` of the stream.   random: of the dataset; number: of the sample in the run."""
        return read_sample(stream, window, self)


class TokenStream:
    """The sequences of one split of a corpus, read as one stream of tokens."""

    def __init__(self, corpus: IndexedDataset, sequences: range) -> None:
        self.corpus = corpus
        self._start = corpus.first_token(sequences.start)
        self.num_tokens = corpus.first_token(sequences.stop) - self._start if sequences else 0

    def tokens(self, start: int, stop: int) -> IntArray:
        """Tokens start..stop-1 of the stream, as stored."""
        return self.corpus.tokens(self._start + start, self._start + stop)

    def place(self, token: int) -> int:
        """Where a token of the stream stands in the corpus."""
        return self._start + token

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

    @abstractmethod
    def tokens_fingerprint(self) -> str | None:
        """Changes when any token of a corpus below does; None where one has no hashes."""

    def get(self, indices: Sequence[int]) -> Batch:
        """These samples as one microbatch."""
        samples = [self._sample(index) for index in indices]
        streams: dict[str, Inputs] = {"decoder": Stream(**_stacked(Stream, samples))}
        encoders = [sample.encoder for sample in samples if sample.encoder is not None]
        if encoders:
            streams["encoder"] = Inputs(**_stacked(Inputs, encoders))
        return Batch(streams=streams, sample_ids=torch.tensor(list(indices), dtype=torch.int64))

    def _sample(self, index: int) -> Sample:
        try:
            return self.sample(index)
        except DataError as error:
            raise DataError(f"sample {index} of the run: {error}") from error


def _stacked(kind: type[Inputs], samples: Sequence[InputSample]) -> dict[str, Any]:
    """The fields of a stream, (B, S) each; None where the samples have nothing."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        arrays = [getattr(sample, field.name) for sample in samples]
        found[field.name] = None if arrays[0] is None else torch.from_numpy(np.stack(arrays))
    return found


class GPTDataset(Dataset):
    """Shuffled windows of one stream, or of several together, each window once an epoch.

    `name` separates the orders of datasets with one seed. Raises DataError if a stream is too short for one window.
    """

    def __init__(self, streams: Sequence[TokenStream], options: SampleOptions, *, seed: int, name: str) -> None:
        self.streams, self.options = tuple(streams), options
        sizes = [num_windows(stream, options) for stream in streams]
        for stream, size in zip(streams, sizes, strict=True):
            if not size:
                raise DataError(
                    f"{stream.corpus.prefix}: the {name} split has {stream.num_tokens} tokens, fewer than one sample "
                    f"({options.window_words}); shorten --seq-length, change --split or add text."
                )
        self._ends = list(accumulate(sizes))
        self.num_samples = self._ends[-1]
        self._random = KeyedRandom(seed, stream=f"data/{name}")
        self._draws = KeyedRandom(seed, stream=f"samples/{name}")
        self._permutation = lru_cache(maxsize=4)(self._make_permutation)

    def sample(self, index: int) -> Sample:
        """Window number P(index modulo epoch) of all streams."""
        epoch, position = divmod(index, self.num_samples)
        window = self._permutation(epoch)(position)
        number = bisect_right(self._ends, window)
        before = self._ends[number - 1] if number else 0
        return self.options.read(self.streams[number], window - before, self._draws, index)

    def fingerprint(self) -> str:
        """A hash of the fingerprints of the corpora."""
        return _combine([stream.corpus.fingerprint() for stream in self.streams])

    def tokens_fingerprint(self) -> str | None:
        """A hash of those of the corpora."""
        return _combine_known([stream.corpus.tokens_fingerprint() for stream in self.streams])

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

    def tokens_fingerprint(self) -> str | None:
        """A hash of those of the parts."""
        return _combine_known([dataset.tokens_fingerprint() for dataset in self.datasets])


def num_windows(stream: TokenStream, options: SampleOptions) -> int:
    """Whole windows in a stream."""
    return max(stream.num_tokens - options.shared, 0) // options.window


def read_window(stream: TokenStream, window: int, options: SampleOptions, vocab_size: int) -> IntArray:
    """The tokens of a window as int64. DataError for an id from vocab_size on."""
    start = window * options.window
    values = stream.tokens(start, start + options.window + options.shared).astype(np.int64)
    if int(values.max()) >= vocab_size or int(values.min()) < 0:
        at = int(np.flatnonzero((values >= vocab_size) | (values < 0))[0])
        raise DataError(
            f"{stream.corpus.bin_path} holds token {values[at]} as number {stream.place(start + at)} of its tokens, "
            f"but the vocabulary ends at {vocab_size - 1}: "
            "the corpus was made with another tokenizer, or is damaged. Name the tokenizer that it was made with."
        )
    return values


def read_sample(stream: TokenStream, window: int, options: SampleOptions) -> Sample:
    """Window number `window` of the stream, as the options want it.  [masks: Megatron core/datasets/gpt_dataset.py]"""
    length = options.seq_length
    start = window * length
    values = read_window(stream, window, options, options.vocab_size)
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


def _combine_known(parts: Sequence[str | None]) -> str | None:
    known = [part for part in parts if part is not None]
    return _combine(known) if len(known) == len(parts) else None
