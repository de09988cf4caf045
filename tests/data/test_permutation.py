"""The computed shuffle: one-to-one for every size, another for every key, fair, and the same forever."""

import numpy as np
import pytest
from goals import Trials
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_moe.data.permutation import Permutation


@pytest.mark.goal("R33", ci=1, nightly=1, what="an epoch of any size meets every sample exactly once")
@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4096, 9999, 65537])
def test_every_element_is_met_exactly_once(size: int, trials: Trials) -> None:
    order = Permutation(size, key=size * 7919 + 1).apply(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))
    trials.add(1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(size=st.integers(1, 5000), key=st.integers(-(2**63), 2**64))
def test_any_size_and_key_give_a_permutation(size: int, key: int) -> None:
    assert np.unique(Permutation(size, key=key).apply(np.arange(size))).size == size


@pytest.mark.parametrize("size", [10**12 + 39, 2**62, 2**61 - 1])
def test_huge_sizes_stay_in_range_without_collisions(size: int) -> None:
    indices = np.concatenate([np.arange(1000), np.arange(size - 1000, size)])
    order = Permutation(size, key=5).apply(indices)
    assert np.unique(order).size == 2000 and 0 <= order.min() and order.max() < size


def test_one_index_and_many_agree() -> None:
    permutation = Permutation(1000, key=3)
    assert [permutation(index) for index in range(50)] == permutation.apply(np.arange(50)).tolist()
    assert permutation.apply(np.arange(6).reshape(2, 3)).shape == (2, 3)


def test_keys_give_different_orders() -> None:
    orders = {tuple(Permutation(100, key=key).apply(np.arange(100)).tolist()) for key in range(200)}
    assert len(orders) == 200


@pytest.mark.parametrize("size", [2, 5, 12, 37])
def test_over_keys_every_place_is_equally_likely(size: int) -> None:
    orders = np.array([Permutation(size, key=key).apply(np.arange(size)) for key in range(1500)])
    for position in (0, size // 2, size - 1):
        counts = np.bincount(orders[:, position], minlength=size)
        # a fair shuffle fails this once in 100,000
        assert stats.chisquare(counts).pvalue > 1e-5


def test_neighbours_are_torn_apart() -> None:
    size = 10000
    order = Permutation(size, key=11).apply(np.arange(size))
    assert abs(stats.spearmanr(order, np.arange(size)).statistic) < 0.04
    assert abs(stats.spearmanr(order[:-1], order[1:]).statistic) < 0.04


def test_the_order_is_the_same_in_every_version() -> None:
    # a changed order would repeat and skip samples of every run that is resumed
    assert Permutation(20, key=1234).apply(np.arange(20)).tolist() == [
        1,
        6,
        12,
        0,
        19,
        18,
        17,
        5,
        10,
        2,
        4,
        15,
        8,
        7,
        14,
        3,
        16,
        11,
        13,
        9,
    ]


@pytest.mark.parametrize("index", [-1, 10])
def test_indices_outside_are_refused(index: int) -> None:
    with pytest.raises(IndexError, match=r"outside 0\.\.9"):
        Permutation(10, key=0)(index)


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_sizes_outside_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 2"):
        Permutation(size, key=0)
