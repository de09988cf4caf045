"""GPT-2's pair encoding equals the tokenizers library's on any text."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_moe.data.byte_pair_encoding import BytePairEncoding, byte_characters

SENTENCES = "Ünïcödé naïve façade. 東京は日本の首都です。 It's we'll they've I'd 1234 5,678.9\n\n\t x  y   z "
TEXT = Path(__file__).read_text() + SENTENCES
STRINGS = [
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n \n", "hello world", "Hello  world!!", "it's IT'S we'll x'd 'tis",
    "12 345 6789", "a1b2", "naïve café", "東京", "\U0001f642\U0001f643", "\u00a0nbsp\u3000wide", "\r\n\r\n",
    "<|endoftext|>", "\x00\x01\x7f", "def f(x):\n    return x\n", "ééé" * 30, "\u0301combining", "x" * 500,
    " " * 50 + "y", "²³½ ١٢٣", "_under_score__", "a\u2028b\u2029c", "’s ‘quotes’", "\ufeffbom", "\U0010ffff",
]  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Any:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([TEXT] * 3, trainer)
    return trained


@pytest.fixture(scope="module")
def ours(library: Any) -> BytePairEncoding:
    model = json.loads(library.to_str())["model"]
    return BytePairEncoding(model["vocab"], [(left, right) for left, right in model["merges"]])


@pytest.mark.parametrize("text", STRINGS)
def test_chosen_strings_are_encoded_as_the_library_does(text: str, library: Any, ours: BytePairEncoding) -> None:
    assert ours.encode(text) == library.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_random_strings_are_encoded_as_the_library_does(library: Any, ours: BytePairEncoding) -> None:
    draw = random.Random(1)
    for _ in range(500):
        pieces = [draw.choice([TEXT[draw.randrange(len(TEXT)) :][:6], chr(draw.randrange(32, 0x2FFF)), " ", "\n", "'"])]
        text = "".join(draw.choice([*pieces, *STRINGS]) for _ in range(8))
        assert ours.encode(text) == library.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text


def test_merges_follow_a_hand_made_example() -> None:
    characters = byte_characters()
    vocabulary = {character: number for number, character in enumerate(characters)}
    merges = [("b", "c"), ("a", "b"), ("a", "bc")]
    vocabulary |= {left + right: 256 + number for number, (left, right) in enumerate(merges)}
    encoding = BytePairEncoding(vocabulary, merges)
    # bc is learnt before ab, so abc is a + bc, and then abc; abab has no bc
    assert encoding.encode("abc") == [258]
    assert encoding.encode("abab") == [257, 257]
    assert encoding.encode("abcbc") == [258, 256]


def test_all_bytes_have_their_own_character() -> None:
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert (characters[ord("a")], characters[ord(" ")], characters[ord("\n")]) == ("a", "Ġ", "Ċ")


def test_ids_that_only_pad_the_vocabulary_decode(ours: BytePairEncoding) -> None:
    assert ours.decode([10**6]) == "\ufffd"


def test_a_word_without_end_takes_no_quadratic_time(ours: BytePairEncoding) -> None:
    started = time.perf_counter()
    assert ours.decode(ours.encode("ab" * 100_000)) == "ab" * 100_000
    assert time.perf_counter() - started < 10


def test_a_vocabulary_without_a_piece_is_refused() -> None:
    vocabulary = {character: number for number, character in enumerate(byte_characters())}
    with pytest.raises(ValueError, match="lacks 1 pieces, among them 'ab'"):
        BytePairEncoding(vocabulary, [("a", "b")])
