"""Any flipped bit changes the hash: by trying all of them, and because each step can be undone."""

import random

import pytest
import torch
from torch import Tensor

from megatron_moe.parallel import bit_hash as hashing
from megatron_moe.parallel.bit_hash import CHUNK, bit_hash

MASK = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(word: int) -> int:
    """The published last steps of splitmix64, with integers that do not overflow."""
    word = (word ^ (word >> 30)) * FIRST & MASK
    word = (word ^ (word >> 27)) * SECOND & MASK
    return word ^ (word >> 31)


def unshift(word: int, bits: int) -> int:
    """The x for which x ^ (x >> bits) is `word`: its highest bits are known, and give the next ones."""
    found = word
    for _ in range(64 // bits + 1):
        found = word ^ (found >> bits)
    return found


def unmix(word: int) -> int:
    word = unshift(word, 31) * pow(SECOND, -1, 1 << 64) & MASK
    word = unshift(word, 27) * pow(FIRST, -1, 1 << 64) & MASK
    return unshift(word, 30)


def by_hand(tensor: Tensor) -> int:
    data = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
    words = [int.from_bytes(data[start : start + 8].ljust(8, b"\0"), "little") for start in range(0, len(data), 8)]
    return sum(mix((word + place * GOLDEN) & MASK) for place, word in enumerate(words)) & MASK


def found(tensor: Tensor) -> int:
    return int(bit_hash(tensor)) & MASK


def flip(tensor: Tensor, bit: int) -> None:
    """Of the tensor's bytes, which are all that a fault knows."""
    tensor.flatten().view(torch.uint8)[bit // 8] ^= 1 << bit % 8


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]


def some(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).mul(9).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 8, 21])
def test_every_bit_counts(dtype: torch.dtype, count: int) -> None:
    tensor = some(count, dtype)
    known = {found(tensor)}
    for bit in range(8 * count * tensor.element_size()):
        flip(tensor, bit)
        known.add(found(tensor))
        flip(tensor, bit)
    # not only another number than the unharmed one's: no two flips look alike
    assert len(known) == 1 + 8 * count * tensor.element_size()


def test_each_word_is_mixed_one_to_one() -> None:
    """So a word that changes, changes its term of the sum: the proof, for all of the 2^64 words."""
    drawn = random.Random(5)
    words = [0, 1, MASK, 1 << 63, *(drawn.getrandbits(64) for _ in range(1000))]
    assert [unmix(mix(word)) for word in words] == words
    assert [mix(unmix(word)) for word in words] == words


@pytest.mark.parametrize("count", [0, 1, 5, 2000])
def test_the_hash_is_the_one_of_the_formula(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "CHUNK", {"cpu": 64})
    tensor = some(count, torch.float32)
    assert found(tensor) == by_hand(tensor)


def test_bits_at_the_ends_of_chunks_count() -> None:
    tensor = some(2 * CHUNK["cpu"] * 2 + 3, torch.float32)
    whole = found(tensor)
    for word in (0, CHUNK["cpu"] - 1, CHUNK["cpu"], 2 * CHUNK["cpu"] - 1, 2 * CHUNK["cpu"], 2 * CHUNK["cpu"] + 1):
        for bit in (0, 31):
            flip(tensor, 64 * word + bit)
            assert found(tensor) != whole
            flip(tensor, 64 * word + bit)
    assert found(tensor) == whole


def test_two_signs_two_places_and_two_zeros_are_told_apart() -> None:
    """What a sum of multiples modulo 2^64 would miss, and what a comparison of values would."""
    tensor = some(16, torch.float64)
    whole = found(tensor)
    for one in range(16):
        for other in range(one):
            damaged = tensor.clone()
            damaged[[one, other]] *= -1
            assert found(damaged) != whole
            damaged = tensor.clone()
            damaged[[one, other]] = tensor[[other, one]]
            assert found(damaged) != whole
    assert found(torch.tensor([0.0])) != found(torch.tensor([-0.0]))
    assert found(torch.full((3,), float("nan"))) == found(torch.full((3,), float("nan")))


def test_a_view_has_the_hash_of_its_numbers() -> None:
    tensor = some(40, torch.float32)
    for view in (tensor[1:9], tensor.view(8, 5).t(), tensor[3]):
        assert found(view) == found(view.clone()) == by_hand(view.clone())
