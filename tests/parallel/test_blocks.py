"""A flat range of a rectangle as few rectangles that tile it."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_moe.parallel.blocks import flat_range_blocks, module_blocks
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import LogicalPiece, ParamLayout
from megatron_moe.parallel.state import ParallelState


@st.composite
def ranges(draw: st.DrawFn) -> tuple[LogicalPiece, int, int]:
    """A rectangle somewhere in a larger tensor, and a range of its elements."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    offset = tuple(draw(st.integers(0, 3)) for _ in shape)
    around = tuple(start + size + draw(st.integers(0, 2)) for start, size in zip(offset, shape, strict=True))
    start = draw(st.integers(0, prod(shape)))
    return LogicalPiece("w", around, offset, shape, None), start, draw(st.integers(0, prod(shape) - start))


@settings(max_examples=300, deadline=None)
@given(ranges())
def test_blocks_tile_the_range_in_few_rectangles(case: tuple[LogicalPiece, int, int]) -> None:
    piece, start, length = case
    whole = torch.zeros(piece.global_shape, dtype=torch.int64)
    inner = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.shape, strict=True))
    numbers = torch.arange(1, prod(piece.shape) + 1)
    flat = numbers[start : start + length]
    blocks = flat_range_blocks(piece, "optim.", flat, start, primary=True)
    for block in blocks:
        where = tuple(slice(at, at + size) for at, size in zip(block.offset, block.shape, strict=True))
        assert not whole[where].any(), "two blocks overlap"
        whole[where] = block.tensor
        assert (block.name, block.global_shape, block.primary) == ("optim.w", piece.global_shape, True)
    expected = torch.zeros_like(numbers)
    expected[start : start + length] = flat
    assert torch.equal(whole[inner], expected.view(piece.shape))
    assert int((whole != 0).sum()) == length  # nothing outside the rectangle
    assert len(blocks) <= max(1, 2 * len(piece.shape) - 1)


def test_a_range_of_a_matrix_by_hand() -> None:
    piece = LogicalPiece("w", (10, 4), (5, 0), (4, 4), None)
    blocks = flat_range_blocks(piece, "", torch.arange(2.0, 13.0), 2, primary=False)
    # the end of row 0, rows 1 and 2 whole, one number of row 3
    assert [(block.offset, block.shape) for block in blocks] == [((5, 2), (1, 2)), ((6, 0), (2, 4)), ((8, 0), (1, 1))]
    assert blocks[1].tensor.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert not blocks[0].primary


def test_blocks_are_views_so_that_loading_fills_the_flat_tensor() -> None:
    flat = torch.zeros(5)
    for block in flat_range_blocks(LogicalPiece("w", (3, 3), (0, 0), (3, 3), None), "", flat, 2, primary=True):
        block.tensor.fill_(7.0)
    assert flat.tolist() == [7.0] * 5


@pytest.mark.parametrize("rank", range(4))
def test_blocks_of_a_module_are_its_parameters_under_their_logical_names(rank: int) -> None:
    state = ParallelState.recorded(Grid(4, tp=2, ep=2), rank)[0]
    dense = ParamLayout((4, 3), splits={0: "tp"})
    experts = ParamLayout((4, 2, 3), splits={0: "ep"}, reduce_over="edp", stacked=True)
    module = nn.Module()
    for name, layout, axis in (("dense", dense, state.tp), ("experts", experts, state.ep)):
        owner = nn.Module()
        owner.weight = nn.Parameter(torch.randn(layout.local_shape(axis)))
        owner.weight.placement = layout  # type: ignore[attr-defined]
        module.add_module(name, owner)
    blocks = {block.name: block for block in module_blocks([module], state)}
    first = 2 * state.ep.rank
    assert list(blocks) == ["dense.weight", f"experts.{first}.weight", f"experts.{first + 1}.weight"]
    assert blocks["dense.weight"].offset == (2 * state.tp.rank, 0)
    assert blocks["dense.weight"].primary == (rank in (0, 1))
    second = blocks[f"experts.{first + 1}.weight"]
    assert (
        second.global_shape == (2, 3)
        and second.tensor.data_ptr() == module.get_parameter("experts.weight")[1].data_ptr()
    )
    assert second.primary == (rank in (0, 1))
