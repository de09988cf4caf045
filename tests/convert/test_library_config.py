"""Values of config.json: what is right in either major is read, what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.convert.library_config import integer, number, refuse_unless, rotary_base, truth


def test_null_is_as_good_as_absent() -> None:
    assert integer({"head_dim": None}, "head_dim", default=8) == 8
    assert integer({"head_dim": 12}, "head_dim", default=8) == 12


@pytest.mark.parametrize("value", [0, -1, 4.0, "4", True, [4]])
def test_counts_are_whole_numbers(value: Any) -> None:
    with pytest.raises(ConfigError, match="config.json: n is"):
        integer({"n": value}, "n")


def test_coefficients_may_be_written_as_whole_numbers() -> None:
    assert number({"eps": 1}, "eps") == 1.0
    for value in ("1e-5", None, True):
        with pytest.raises(ConfigError, match="expected a number"):
            number({"eps": value}, "eps")


def test_truth_is_not_a_number() -> None:
    assert truth({}, "tie", default=True) is True
    with pytest.raises(ConfigError, match="expected true or false"):
        truth({"tie": 1}, "tie", default=True)


def test_a_refusal_says_what_would_do() -> None:
    refuse_unless({}, "window", None, why="x")
    refuse_unless({"window": None}, "window", None, why="x")
    with pytest.raises(ConfigError, match="window is 5, and there are no windows; only None can be imported"):
        refuse_unless({"window": 5}, "window", None, why="and there are no windows")


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({}, 7.0),
        ({"rope_theta": 10}, 10.0),
        ({"rope_parameters": {"rope_theta": 11.0, "rope_type": "default"}}, 11.0),
        ({"rope_theta": 12, "rope_parameters": {"rope_theta": 12.0}, "rope_scaling": None}, 12.0),
        ({"rope_theta": 13, "rope_scaling": {"type": "default"}}, 13.0),
    ],
)
def test_rotary_base_in_every_form(config: dict[str, Any], base: float) -> None:
    assert rotary_base(config, default=7.0) == base


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"factor": 2.0}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    ],
)
def test_scaled_positions_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rope_"):
        rotary_base(config, default=1e4)
