"""How a parameter is split over its replicas, and which rectangles of logical tensors each of them owns."""

from collections.abc import Sequence

import pytest
import torch

from megatron_moe.optim.fully_sharded import Slab, split_dim
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import ParamLayout
from megatron_moe.parallel.state import ParallelState


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [
        ((8, 4), 4, 0),  # evenly
        ((33, 8), 4, 0),  # 9, 8, 8 and 8 rows are even enough
        ((31, 8), 4, 1),
        ((2, 24, 16), 4, 1),  # gate and up
        ((2, 6, 128, 64), 16, 2),  # heads of one rank: by their width
        ((3, 5), 2, 0),  # nothing splits evenly
        ((1,), 2, 0),
    ],
)
def test_the_first_dimension_that_splits_well_is_split(shape: tuple[int, ...], ranks: int, dim: int) -> None:
    assert split_dim(shape, ranks) == dim


def slabs(layout: ParamLayout, shape: Sequence[int], ranks: int) -> list[tuple[Slab, torch.Tensor]]:
    """Each rank's part of the numbers 0, 1, ... in a parameter of that shape."""
    whole = torch.arange(torch.Size(shape).numel()).view(*shape)
    dim = split_dim(shape, ranks)
    start, found = 0, []
    for part in whole.chunk(ranks, dim):
        slab = Slab("layers.3.mlp.w", layout, dim, start, tuple(part.shape), slice(0, part.numel()))
        found.append((slab, part.flatten()))
        start += part.shape[dim]
    return found


@pytest.mark.parametrize("shape", [(8, 4), (5, 3), (2, 24, 16)])
def test_the_blocks_of_all_ranks_make_the_parameter(shape: tuple[int, ...]) -> None:
    state = ParallelState.alone()
    whole = torch.full(shape, -1)
    for slab, flat in slabs(ParamLayout(shape), shape, 2):
        (block,) = slab.blocks("exp_avg/", slab.of(flat), True, state)
        assert (block.name, block.global_shape) == ("exp_avg/layers.3.mlp.w", shape)
        place = tuple(slice(at, at + size) for at, size in zip(block.offset, block.shape, strict=True))
        assert (whole[place] == -1).all()
        whole[place] = block.tensor
    assert torch.equal(whole, torch.arange(whole.numel()).view(shape))


@pytest.mark.parametrize("ranks", [2, 4], ids=["by experts", "by rows of each expert"])
def test_each_expert_of_a_stack_is_a_tensor_of_its_own(ranks: int) -> None:
    """Two experts on each of two ranks of ep; their replicas split them."""
    layout = ParamLayout((4, 2, 8, 3), splits={0: "ep"}, reduce_over="edp", stacked=True)
    state, _ = ParallelState.recorded(Grid(2, ep=2), 1)
    local = torch.arange(2 * 2 * 8 * 3).view(2, 2, 8, 3)
    found = {name: torch.full((2, 8, 3), -1) for name in ("layers.3.mlp.2.w", "layers.3.mlp.3.w")}
    for slab, flat in slabs(layout, local.shape, ranks):
        for block in slab.blocks("", slab.of(flat), True, state):
            assert block.global_shape == (2, 8, 3)
            place = tuple(slice(at, at + size) for at, size in zip(block.offset, block.shape, strict=True))
            found[block.name][place] = block.tensor
    assert torch.equal(torch.stack(list(found.values())), local)
