"""Which sequences belong to which split: Megatron's rounding, against numbers worked out by hand."""

import pytest

from megatron_moe.config.data import DataConfig
from megatron_moe.data.split import split_ranges


def ranges(split: str, num_sequences: int) -> list[tuple[int, int]]:
    shares = DataConfig(seq_length=8, split=split).split_fractions
    return [(part.start, part.stop) for part in split_ranges(shares, num_sequences).values()]


@pytest.mark.parametrize(
    ("split", "num_sequences", "expected"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 100, [(0, 97), (97, 100), (100, 100)]),  # 96.9 and 99.9 round up: nothing is left for test
        ("969,30,1", 10, [(0, 10), (10, 10), (10, 10)]),
        ("99,1,0", 200, [(0, 198), (198, 200), (200, 200)]),
        ("100", 7, [(0, 7), (7, 7), (7, 7)]),
        ("0,100,0", 7, [(0, 0), (0, 7), (7, 7)]),
        ("1,1", 5, [(0, 2), (2, 5), (5, 5)]),  # 2.5 rounds to the even 2
        ("3,3,2", 4, [(0, 2), (2, 3), (3, 4)]),  # 1.5 rounds to the even 2
        ("1,1,1", 0, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_bounds_are_rounded_as_megatron_does(split: str, num_sequences: int, expected: list[tuple[int, int]]) -> None:
    assert ranges(split, num_sequences) == expected
