"""Proportions of a blend: counted one by one, kept at every moment, reached at once anywhere."""

import math
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.errors import ConfigError
from megatron_moe.data.blend import Blend


@settings(max_examples=40, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9), start=st.integers(0, 2**40))
def test_indices_count_what_each_corpus_gave_before(weights: list[float], start: int) -> None:
    blend = Blend(weights)
    given_before: Counter[int] = Counter()
    for number in range(300):
        place = blend.locate(number)
        assert place.index == given_before[place.dataset]
        given_before[place.dataset] += 1
    # the same far out: consecutive numbers of one corpus have consecutive indices
    last: dict[int, int] = {}
    for number in range(start, start + 100):
        place = blend.locate(number)
        assert last.get(place.dataset, place.index - 1) == place.index - 1
        last[place.dataset] = place.index


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [5, 0.01, 2, 2, 1e-3], [1]])
def test_proportions_hold_at_every_moment(weights: list[float]) -> None:
    blend, counts = Blend(weights), [0] * len(weights)
    for number in range(4096):
        counts[blend.locate(number).dataset] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight / sum(weights) * (number + 1)) <= math.log2(number + 1) + 2


def test_a_known_blend_is_written_out() -> None:
    # halves of [0, 1): 0 -> 0, 1 -> 1/2, 2 -> 1/4, 3 -> 3/4, 4 -> 1/8, ...; the first corpus owns [0, 3/4)
    places = [Blend([3, 1]).locate(number) for number in range(8)]
    assert [place.dataset for place in places] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert [place.index for place in places] == [0, 1, 2, 0, 3, 4, 5, 1]


def test_weights_need_not_add_up_to_one() -> None:
    assert [Blend([7, 3]).locate(n) for n in range(200)] == [Blend([0.7, 0.3]).locate(n) for n in range(200)]


def test_any_sample_is_reached_at_once() -> None:
    blend = Blend([0.5, 0.3, 0.2])
    started = time.perf_counter()
    place = blend.locate(10**15)
    assert time.perf_counter() - started < 0.1
    share = [0.5, 0.3, 0.2][place.dataset]
    assert abs(place.index - share * 10**15) < 60


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("inf"), 1], [float("nan")], [1, 1e-30]])
def test_weights_that_give_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="leave"):
        Blend(weights)


def test_numbers_outside_are_refused() -> None:
    with pytest.raises(IndexError):
        Blend([1]).locate(-1)
