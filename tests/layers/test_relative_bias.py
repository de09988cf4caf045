"""Relative positions: buckets against the published ones, the table in attention, its gradient."""

import math

import pytest
import torch

from megatron_moe.layers.relative_bias import RelativeBias, distance_buckets
from megatron_moe.parallel.state import ParallelState
from tests.layers.contexts import context, make

ALONE = ParallelState.alone()
# T5's, of 32 buckets up to a distance of 128
OFFSETS = (-200, -128, -127, -100, -64, -32, -20, -16, -12, -8, -7, -3, -1, 0, 1, 2, 7, 8, 11, 12, 16, 20, 32, 64, 200)
BOTH_WAYS = (15, 15, 15, 15, 14, 12, 10, 10, 9, 8, 7, 3, 1, 0, 17, 18, 23, 24, 24, 25, 26, 26, 28, 30, 31)
CAUSAL = (31, 31, 31, 30, 26, 21, 17, 16, 12, 8, 7, 3, 1, 0, *[0] * 11)


@pytest.mark.parametrize(("causal", "wanted"), [(False, BOTH_WAYS), (True, CAUSAL)])
def test_buckets_are_those_of_t5(causal: bool, wanted: tuple[int, ...]) -> None:
    found = distance_buckets(torch.tensor(OFFSETS), num_buckets=32, max_distance=128, causal=causal)
    assert tuple(found.tolist()) == wanted


def slow_bucket(ahead: int, buckets: int, most: int, causal: bool) -> int:
    """One distance, by the definition."""
    first = 0
    if causal:
        distance = max(-ahead, 0)
    else:
        buckets //= 2
        first, distance = (buckets if ahead > 0 else 0), abs(ahead)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    far = math.floor(math.log(distance / exact) / math.log(most / exact) * (buckets - exact) + 1e-12)
    return first + min(exact + far, buckets - 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 10), (16, 64), (4, 3)])
def test_buckets_are_those_of_the_definition(buckets: int, most: int, causal: bool) -> None:
    offsets = range(-3 * most, 3 * most + 1)
    found = distance_buckets(torch.tensor(list(offsets)), num_buckets=buckets, max_distance=most, causal=causal)
    assert found.tolist() == [slow_bucket(ahead, buckets, most, causal) for ahead in offsets]


def table(causal: bool) -> RelativeBias:
    bias = RelativeBias(3, ALONE.tp, num_buckets=8, max_distance=10, causal=causal, std=1.0, dtype=torch.float64)
    return make(bias, ALONE)


def test_each_pair_gets_the_number_of_its_distance_and_head() -> None:
    bias = table(False)
    found = bias(context(6, 2, ALONE).view)
    assert found.shape == (1, 3, 6, 6)
    for row in range(6):
        for column in range(6):
            bucket = slow_bucket(column - row, 8, 10, False)
            assert torch.equal(found[0, :, row, column], bias.weight[bucket])


def test_a_decoded_token_has_the_row_that_it_has_in_the_whole() -> None:
    bias = table(True)
    whole = bias(context(6, 2, ALONE).view)
    view = context(2, 2, ALONE).view
    from_four = type(view)(**{**vars(view), "start": 4})
    assert torch.equal(bias(from_four), whole[:, :, 4:6])


def test_the_table_learns() -> None:
    bias = table(False)
    weights = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    (bias(context(6, 1, ALONE).view) * weights).sum().backward()
    wanted = torch.zeros(8, 3, dtype=torch.float64)
    for row in range(6):
        for column in range(6):
            wanted[slow_bucket(column - row, 8, 10, False)] += weights[0, :, row, column]
    assert bias.weight.grad is not None
    torch.testing.assert_close(bias.weight.grad, wanted)
