"""Unigram, bigram and gzip figures against slow counting, hand-made examples and what theory says."""

import gzip
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_moe.config.errors import DataError
from megatron_moe.report.baselines import (
    bigram_cross_entropy,
    bits_per_byte,
    gzip_bits_per_byte,
    unigram_cross_entropy,
)


def slow_unigram(training: Sequence[int], vocab_size: int) -> list[float]:
    counts = Counter(training)
    return [(counts[token] + 1) / (len(training) + vocab_size) for token in range(vocab_size)]


def slow_bigram(training: Sequence[int], tokens: Sequence[int], vocab_size: int) -> float:
    unigram = slow_unigram(training, vocab_size)
    followers: dict[int, list[int]] = {}
    for left, right in zip(training, training[1:], strict=False):
        followers.setdefault(left, []).append(right)
    total = -math.log(unigram[tokens[0]])
    for left, right in zip(tokens, tokens[1:], strict=False):
        after = followers.get(left, [])
        if after:
            different = len(set(after))
            total -= math.log((after.count(right) + different * unigram[right]) / (len(after) + different))
        else:
            total -= math.log(unigram[right])
    return total / len(tokens)


def test_unigram_of_a_hand_made_text() -> None:
    # counts 3, 1, 0 plus one each, of 7
    found = unigram_cross_entropy(np.array([0, 0, 1, 0]), np.array([0, 1, 2]), 3)
    assert found == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3)


def test_bigram_of_a_hand_made_text() -> None:
    # 0 is followed by 1, 1, 2; unigram p = 4/9, 3/9, 2/9
    found = bigram_cross_entropy(np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1]), 3)
    assert found == pytest.approx(-(math.log(4 / 9) + math.log((2 + 2 * 3 / 9) / (3 + 2))) / 2)


@pytest.mark.parametrize("seed", range(20))
def test_both_equal_slow_counting(seed: int) -> None:
    random = np.random.default_rng(seed)
    vocab_size = int(random.integers(1, 30))
    training = random.integers(0, vocab_size, int(random.integers(1, 200)))
    # a third of the vocabulary may be missing from the training text
    tokens = random.integers(0, vocab_size, int(random.integers(1, 80)))
    training = training % max(1, 2 * vocab_size // 3)
    slow = slow_unigram(training.tolist(), vocab_size)
    assert unigram_cross_entropy(training, tokens, vocab_size) == pytest.approx(
        -sum(math.log(slow[token]) for token in tokens) / len(tokens), rel=1e-12
    )
    assert bigram_cross_entropy(training, tokens, vocab_size) == pytest.approx(
        slow_bigram(training.tolist(), tokens.tolist(), vocab_size), rel=1e-12
    )


@pytest.mark.parametrize("before", [0, 3, 6])
def test_bigram_probabilities_sum_to_one(before: int) -> None:
    training = np.random.default_rng(0).integers(0, 6, 40)  # 6 is never seen
    first = bigram_cross_entropy(training, np.array([before]), 7)
    pairs = [2 * bigram_cross_entropy(training, np.array([before, token]), 7) - first for token in range(7)]
    assert sum(math.exp(-nats) for nats in pairs) == pytest.approx(1.0, rel=1e-12)


def test_bigram_reaches_the_entropy_rate_of_a_markov_chain_and_unigram_that_of_its_mean() -> None:
    random = np.random.default_rng(1)
    chain = random.dirichlet(np.full(8, 0.5), size=8)
    draws, text = random.random(60_000), np.zeros(60_000, dtype=np.uint16)
    borders = chain.cumsum(axis=1)
    for place in range(1, len(text)):
        text[place] = min(7, int(np.searchsorted(borders[text[place - 1]], draws[place])))
    often = np.bincount(text, minlength=8) / len(text)
    rate = -float((often[:, None] * chain * np.log(chain)).sum())
    entropy = -float((often * np.log(often)).sum())
    assert bigram_cross_entropy(text[:50_000], text[50_000:], 8) == pytest.approx(rate, abs=0.02)
    assert unigram_cross_entropy(text[:50_000], text[50_000:], 8) == pytest.approx(entropy, abs=0.02)


def test_tokens_of_sixteen_bits_do_not_overflow() -> None:
    training = np.array([60_000, 60_001] * 50, dtype=np.uint16)
    assert bigram_cross_entropy(training, training, 65_000) == pytest.approx(
        slow_bigram(training.tolist(), training.tolist(), 65_000), rel=1e-12
    )


def test_gzip_counts_the_bits_of_its_file() -> None:
    text = b"the quick brown fox " * 500
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / len(text)
    noise = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    assert 8.0 < gzip_bits_per_byte(noise) < 8.1


def test_bits_per_byte() -> None:
    # one bit per token, two bytes per token
    assert bits_per_byte(math.log(2), 100, 200) == pytest.approx(0.5)


def test_what_cannot_be_measured_is_refused() -> None:
    some, none = np.array([0, 1]), np.array([], dtype=np.int64)
    with pytest.raises(DataError, match="measured text has no tokens"):
        unigram_cross_entropy(some, none, 2)
    with pytest.raises(DataError, match="training text has no tokens"):
        bigram_cross_entropy(none, some, 2)
    with pytest.raises(DataError, match="token id 5, but the vocabulary has 2"):
        bigram_cross_entropy(some, np.array([5]), 2)
    with pytest.raises(DataError, match="token id -1"):
        unigram_cross_entropy(np.array([-1]), some, 2)
    with pytest.raises(DataError, match="0 bytes"):
        bits_per_byte(1.0, 3, 0)
    with pytest.raises(DataError, match="no text"):
        gzip_bits_per_byte(b"")
