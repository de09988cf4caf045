"""What simple models make of the same text: the figures that a trained model must beat."""

import gzip
import math

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import DataError

Tokens = NDArray[np.integer]


def unigram_cross_entropy(training: Tokens, tokens: Tokens, vocab_size: int) -> float:
    """Nats per token of `tokens` (n,) under the add-one frequencies of `training` (N,): p(b) = (c(b) + 1) / (N + V).

    Raises DataError for no tokens and for an id that is not below vocab_size.
    """
    _check(training, tokens, vocab_size)
    return float(-np.log(_unigram(training, vocab_size)[tokens]).mean())


def bigram_cross_entropy(training: Tokens, tokens: Tokens, vocab_size: int) -> float:
    """Nats per token under counts of pairs, mixed with the unigram model where pairs are rare.  [Witten and Bell, 1991]

    p(b|a) = (c(ab) + u(a) · p(b)) / (c(a) + u(a)) with u(a) different followers of a in `training`; p(b) after an a
    that has none, and for the first token.  Raises DataError as above.
    """
    _check(training, tokens, vocab_size)
    unigram = _unigram(training, vocab_size)
    seen, count = np.unique(_pairs(training, vocab_size), return_counts=True)
    followed = np.bincount(training[:-1], minlength=vocab_size)  # (V,) c(a): times that a token follows a
    followers = np.bincount(seen // vocab_size, minlength=vocab_size)  # (V,) u(a)

    probability = unigram[tokens]
    before = tokens[:-1]
    backed_off = followers[before] * probability[1:]
    total = followed[before] + followers[before]
    known = total > 0
    pair_count = _look_up(seen, count, _pairs(tokens, vocab_size))
    probability[1:][known] = (pair_count + backed_off)[known] / total[known]
    return float(-np.log(probability).mean())


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits that gzip -9 needs for each byte of a text. Raises DataError for an empty one."""
    if not text:
        raise DataError("gzip was given no text to compress; the baseline needs at least one byte.")
    return 8.0 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """A loss in nats per token as bits per byte of the text that the tokens stand for: the same for any tokenizer."""
    if num_bytes <= 0:
        raise DataError(
            f"{num_tokens} tokens stand for {num_bytes} bytes of text; a rate per byte needs at least one byte."
        )
    return nats_per_token * num_tokens / (num_bytes * math.log(2.0))


def _unigram(training: Tokens, vocab_size: int) -> NDArray[np.float64]:
    """(V,) probabilities, none of them zero."""
    frequency: NDArray[np.float64] = (np.bincount(training, minlength=vocab_size) + 1.0) / (len(training) + vocab_size)
    return frequency


def _pairs(tokens: Tokens, vocab_size: int) -> NDArray[np.int64]:
    """One number for each pair of neighbours."""
    wide = tokens.astype(np.int64)
    return wide[:-1] * vocab_size + wide[1:]


def _look_up(seen: NDArray[np.int64], count: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """The count of each wanted pair, 0 for one that is not in the sorted `seen`."""
    if not len(seen):
        return np.zeros(len(wanted), dtype=np.int64)
    # neighbours in memory find neighbours: much faster than looking up in the order of the text
    unique, where = np.unique(wanted, return_inverse=True)
    place = np.searchsorted(seen, unique).clip(max=len(seen) - 1)
    return np.where(seen[place] == unique, count[place], 0)[where]


def _check(training: Tokens, tokens: Tokens, vocab_size: int) -> None:
    for name, stream in (("training", training), ("measured", tokens)):
        if not len(stream):
            raise DataError(f"the {name} text has no tokens; a baseline needs some.")
        lowest, highest = int(stream.min()), int(stream.max())
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise DataError(
                f"the {name} text has token id {wrong}, but the vocabulary has {vocab_size} ids; "
                f"give the vocabulary size of the tokenizer that made the tokens."
            )
