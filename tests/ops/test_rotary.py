"""Rotary embedding against turning each pair of numbers by hand."""

import math

import numpy as np
import pytest
import torch

from megatron_moe.ops.rotary import rotary_angles, rotate


def slow_rotate(heads: torch.Tensor, positions: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """(S, B, N, D): pair (i, i + width/2) of each head turned by position · base^(-2i/width)."""
    out = heads.clone()
    length, samples, num_heads, _ = heads.shape
    for index in np.ndindex(length, samples, num_heads, width // 2):
        row, sample, head, pair = index
        angle = int(positions[row, sample]) * base ** (-2.0 * pair / width)
        first, second = (float(heads[row, sample, head, at]) for at in (pair, pair + width // 2))
        out[row, sample, head, pair] = first * math.cos(angle) - second * math.sin(angle)
        out[row, sample, head, pair + width // 2] = second * math.cos(angle) + first * math.sin(angle)
    return out


@pytest.mark.parametrize(("width", "base"), [(8, 10000.0), (4, 10000.0), (8, 1e6), (2, 3.0)])
def test_pairs_turn_by_their_angle_and_the_rest_stays(width: int, base: float) -> None:
    heads = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 7], [1, 8], [2, 0], [3, 1], [40, 2]])  # the second sample is packed
    found = rotate(heads, rotary_angles(positions, width, base, torch.float64))
    torch.testing.assert_close(found, slow_rotate(heads, positions, width, base), rtol=1e-12, atol=1e-12)
    assert torch.equal(found[..., width:], heads[..., width:])


def test_a_quarter_turn_by_hand() -> None:
    # width 2: one pair, frequency 1; position 0 changes nothing
    angles = (torch.tensor([[[0.0]]]), torch.tensor([[[1.0]]]))  # cos and sin of 90 degrees
    assert rotate(torch.tensor([[[[3.0, 4.0, 5.0]]]]), angles).tolist() == [[[[-4.0, 3.0, 5.0]]]]
    cos, sin = rotary_angles(torch.zeros(1, 1, dtype=torch.int64), 4, 10000.0, torch.float32)
    assert cos.tolist() == [[[1.0, 1.0]]] and sin.tolist() == [[[0.0, 0.0]]]


def test_grouped_heads_turn_alike() -> None:
    heads = torch.randn(3, 2, 2, 4, 6)
    angles = rotary_angles(torch.arange(3)[:, None].expand(3, 2), 6, 10000.0, torch.float32)
    assert torch.equal(rotate(heads, angles), rotate(heads.flatten(2, 3), angles).view_as(heads))


def test_scores_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(first: int, second: int) -> float:
        turned = [
            rotate(heads, rotary_angles(torch.tensor([[place]]), 16, 10000.0, torch.float64))
            for heads, place in ((query, first), (key, second))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 1) == pytest.approx(score(1003, 1001), abs=1e-9)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_gradient() -> None:
    heads = torch.randn(3, 1, 2, 6, dtype=torch.float64, requires_grad=True)
    angles = rotary_angles(torch.arange(3)[:, None], 4, 10000.0, torch.float64)
    assert torch.autograd.gradcheck(lambda values: rotate(values, angles), heads)


def test_bfloat16_angles_are_those_of_float32_rounded_once() -> None:
    positions = torch.tensor([[4000]])
    narrow, wide = (rotary_angles(positions, 8, 10000.0, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert narrow[0].dtype == torch.bfloat16
    assert torch.equal(narrow[0], wide[0].bfloat16()) and torch.equal(narrow[1], wide[1].bfloat16())
