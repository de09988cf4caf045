"""What is learnt from a window besides each next token: a text after its prefix, or the spans that were cut out."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_moe.data.gpt_dataset import InputSample, Sample, SampleOptions, TokenStream, read_sample, read_window
from megatron_moe.data.indexed_dataset import IntArray
from megatron_moe.data.span_corruption import corrupt, noise_mask
from megatron_moe.parallel.random import KeyedRandom


@dataclass(frozen=True, kw_only=True)
class PrefixOptions(SampleOptions):
    """Prefix LM: the first tokens of each document of a sample are seen by all of it, and only the rest is learnt.

    A prefix has 0 to n - 1 of a document's n tokens here, each length equally likely.  [T5, arXiv:1910.10683, 3.2.1]
    """

    def read(self, stream: TokenStream, window: int, random: KeyedRandom, number: int) -> Sample:
        sample = read_sample(stream, window, self)
        prefix = np.zeros(len(sample.tokens), np.bool_)
        for document in range(int(sample.segments.max()) + 1):
            places = np.flatnonzero(sample.segments == document)
            share = random.at(pass_index=document).uniform(torch.tensor(number)).item()
            prefix[places[: int(share * len(places))]] = True
        # the last token of the prefix is asked for the first one after it
        learnt = sample.loss_mask * ~(prefix & np.append(prefix[1:], False))
        return replace(sample, prefix=prefix, loss_mask=learnt.astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class SpanOptions(SampleOptions):
    """Span corruption: a window for the encoder, without some spans, which the decoder has to say.

    seq_length: of the encoder's input.   vocab_size: ids of the corpus, after which the sentinels come.
    """

    raw_length: int
    noise_density: float
    mean_span: float
    num_sentinels: int
    end_id: int  # closes both sequences
    start_id: int  # what the decoder reads first

    @property
    def window(self) -> int:
        return self.raw_length

    @property
    def window_words(self) -> str:
        return f"{self.raw_length} tokens for --seq-length {self.seq_length}"

    @property
    def shared(self) -> int:
        return 0

    def read(self, stream: TokenStream, window: int, random: KeyedRandom, number: int) -> Sample:
        tokens = read_window(stream, window, self, self.vocab_size)
        mask = noise_mask(len(tokens), self.noise_density, self.mean_span, random, number)
        source, target = corrupt(
            tokens,
            mask,
            first_sentinel=self.vocab_size + self.num_sentinels - 1,
            end=self.end_id,
        )
        decoder = InputSample.of_one_document(_shifted(target, self.start_id))
        return Sample(
            **vars(decoder),
            labels=target,
            loss_mask=np.ones(len(target), np.float32),
            encoder=InputSample.of_one_document(source),
        )


def _shifted(target: IntArray, start: int) -> IntArray:
    """What the decoder reads: each token before the one that it has to say."""
    return np.concatenate([[start], target[:-1]])
