"""GPT-2's byte-level pair encoding: text → words → bytes → merges learnt in order.  [openai/gpt-2 src/encoder.py]"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from megatron_moe.config.optional import require

# the words of GPT-2: English contractions, letters, digits, other signs, each with one blank before; then blanks
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# longer words are rare, and would fill the cache
CACHED_LENGTH = 64
# for ids that only pad the vocabulary
UNKNOWN = "\ufffd".encode()


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in vocab.json and merges.txt."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


class BytePairEncoding:
    """Text to ids and back, without special tokens.

    vocabulary: piece → id, pieces written in byte_characters. merges: pairs of pieces, the first learnt first.
    Raises ValueError if the vocabulary lacks a byte or the result of a merge.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        characters = byte_characters()
        missing = [
            piece for piece in (*characters, *(left + right for left, right in merges)) if piece not in vocabulary
        ]
        if missing:
            raise ValueError(f"the vocabulary lacks {len(missing)} pieces, among them {missing[0]!r}")
        self._byte_ids = [vocabulary[character] for character in characters]
        self._merges = {
            (vocabulary[left], vocabulary[right]): (rank, vocabulary[left + right])
            for rank, (left, right) in reversed(list(enumerate(merges)))
        }
        values = {character: byte for byte, character in enumerate(characters)}
        self._piece_bytes = {
            number: bytes(values[character] for character in piece)
            if all(character in values for character in piece)
            else piece.encode()
            for piece, number in vocabulary.items()
        }
        self._find_words = require("regex", extra="data").compile(WORDS).findall
        self._cached = lru_cache(maxsize=1 << 16)(self._merge_word)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = []
        for word in self._find_words(text):
            ids.extend(self._cached(word) if len(word) <= CACHED_LENGTH else self._merge_word(word))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become the replacement character."""
        return b"".join(self._piece_bytes.get(number, UNKNOWN) for number in ids).decode("utf-8", errors="replace")

    def _merge_word(self, word: str) -> tuple[int, ...]:
        """Merges neighbours, the earliest learnt pair first, then from the left; O(n log n): long words do no harm."""
        ids = [self._byte_ids[byte] for byte in word.encode()]
        after = list(range(1, len(ids) + 1))
        before = list(range(-1, len(ids) - 1))
        # (rank, place of the left piece, left, right): stale once either piece has changed
        pairs = enumerate(zip(ids, ids[1:], strict=False))
        waiting = [(self._merges[pair][0], place, *pair) for place, pair in pairs if pair in self._merges]
        heapq.heapify(waiting)
        while waiting:
            _, place, left, right = heapq.heappop(waiting)
            other = after[place]
            if ids[place] != left or other >= len(ids) or ids[other] != right:
                continue
            ids[place], ids[other] = self._merges[left, right][1], -1
            after[place] = after[other]
            if after[place] < len(ids):
                before[after[place]] = place
            for start in (before[place], place):
                if start >= 0 and after[start] < len(ids):
                    pair = (ids[start], ids[after[start]])
                    if pair in self._merges:
                        heapq.heappush(waiting, (self._merges[pair][0], start, *pair))
        return tuple(number for number in ids if number >= 0)
