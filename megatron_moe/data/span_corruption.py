"""Span corruption: some spans of a text are cut out of the input, each a sentinel, and are what has to be said.

    raw      Thank you for inviting me to your party last week
    input    Thank you <X> me to your party <Y> week </s>
    target   <X> for inviting <Y> last </s>

Source: T5, arXiv:1910.10683, section 3.1.4; the counts, their rounding and the order of spans are those of its public
code (text-to-text-transfer-transformer, t5/data/preprocessors.py): the text begins with a span that is kept and ends
with one that is noise, all spans have at least one token, and all ways of cutting are equally likely. This project
draws the cuts by keys, not from a generator. Sentinels are the highest ids: the first span has the highest.
"""

from typing import Any

import numpy as np
import torch

from megatron_moe.config.span_lengths import fits
from megatron_moe.data.indexed_dataset import IntArray
from megatron_moe.parallel.random import KeyedRandom

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def noise_mask(length: int, density: float, mean_span: float, random: KeyedRandom, number: int) -> Mask:
    """(length,) True where a token is noise.   random: of the run; number: of the sample, which alone keys the draw.

    Raises ValueError where a span of noise would have no kept token before it.
    """
    if not fits(length, density, mean_span):
        raise ValueError(f"{length} tokens have no room for {density:g} of noise in spans of {mean_span:g}")
    noise = round(length * density)
    spans = round(noise / mean_span)
    kept_lengths = _cut(length - noise, spans, random.at(pass_index=0), number)
    noise_lengths = _cut(noise, spans, random.at(pass_index=1), number)
    both = np.stack([kept_lengths, noise_lengths], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, both)


def _cut(total: int, parts: int, random: KeyedRandom, number: int) -> IntArray:
    """(parts,) positive lengths that add up to `total`, each way equally likely: cuts at some of total - 1 places."""
    draws = random.uniform_rows(torch.tensor([number]), max(total - 1, 1))[0, : total - 1].numpy()
    places = np.sort(np.argsort(draws, kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], places, [total]])).astype(np.int64)


def spans_to_sentinels(tokens: IntArray, mask: Mask, first_sentinel: int) -> IntArray:
    """`tokens` with each run where `mask` holds as one sentinel: first_sentinel, first_sentinel - 1, ..."""
    before = np.concatenate([[False], mask[:-1]])
    begins = mask & ~before
    numbered = np.where(begins, first_sentinel + 1 - np.cumsum(begins), tokens)
    found: IntArray = numbered[begins | ~mask]
    return found


def corrupt(tokens: IntArray, mask: Mask, *, first_sentinel: int, end: int) -> tuple[IntArray, IntArray]:
    """Input and target, each closed by `end`."""
    source = spans_to_sentinels(tokens, mask, first_sentinel)
    target = spans_to_sentinels(tokens, ~mask, first_sentinel)
    return np.append(source, end), np.append(target, end)
