"""A parameter's statement of its placement: what the ranks hold together, and how it starts."""

import itertools

import pytest
import torch
from scipy import stats
from torch import nn

from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import (
    Init,
    LogicalPiece,
    ParamLayout,
    initialise,
    layout_of,
    logical_pieces,
    materialise,
    new_parameter,
)
from megatron_moe.parallel.state import ParallelState

GRID = Grid(16, tp=2, cp=2, pp=2, ep=4, etp=2)
LAYOUTS = {
    "norm": ParamLayout((8,), sum_over=("tp",)),
    "qkv": ParamLayout((4, 3, 2, 5), splits={0: "tp"}),
    "mlp": ParamLayout((2, 6, 5), splits={1: "tp"}),
    "experts": ParamLayout((8, 2, 6, 5), splits={0: "ep", 2: "etp"}, reduce_over="edp", stacked=True),
    "head": ParamLayout((8, 5), splits={0: "tp"}, sum_over=("embedding",)),
}


def states(grid: Grid) -> list[ParallelState]:
    return [ParallelState.recorded(grid, rank)[0] for rank in range(grid.world_size)]


def region(piece: LogicalPiece) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.shape, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("grid", [Grid(1), Grid(4, tp=2, ep=2), Grid(8, ep=4, etp=2), GRID], ids=str)
def test_primary_pieces_of_a_stage_tile_every_logical_tensor(name: str, grid: Grid) -> None:
    layout = LAYOUTS[name]
    held: dict[str, torch.Tensor] = {}
    primary: dict[str, torch.Tensor] = {}
    members = states(grid)[: grid.stage_size]
    for state in members:
        for piece in logical_pieces("layers.3.mlp.w", layout, state):
            for counts, counted in ((held, True), (primary, layout.is_primary(state))):
                counts.setdefault(piece.name, torch.zeros(piece.global_shape))[region(piece)] += counted
    for count in primary.values():
        assert torch.equal(count, torch.ones_like(count))
    for count in held.values():  # every element has equally many holders
        assert bool((count == count.flatten()[0]).all())
    expected = [f"layers.3.mlp.{expert}.w" for expert in range(8)] if layout.stacked else ["layers.3.mlp.w"]
    assert sorted(held) == expected
    shape = layout.global_shape[1:] if layout.stacked else layout.global_shape
    assert all(count.shape == shape for count in held.values())


def test_only_the_first_stage_speaks_for_a_tied_embedding() -> None:
    speakers = [state.rank for state in states(GRID) if LAYOUTS["head"].is_primary(state)]
    assert speakers == [0, 1]  # one for each half of the vocabulary


def test_an_experts_piece_by_hand() -> None:
    state = ParallelState.recorded(Grid(8, ep=2, etp=2), 3)[0]  # second expert half, second width half
    pieces = logical_pieces("layers.1.mlp.experts.w1", LAYOUTS["experts"], state)
    assert [piece.name for piece in pieces] == [f"layers.1.mlp.experts.{expert}.w1" for expert in (4, 5, 6, 7)]
    assert pieces[1] == LogicalPiece("layers.1.mlp.experts.5.w1", (2, 6, 5), (0, 3, 0), (2, 3, 5), 1)
    local = torch.arange(4 * 2 * 3 * 5).view(4, 2, 3, 5)
    assert torch.equal(pieces[1].of(local), local[1])


def test_a_dimension_that_does_not_split_is_refused() -> None:
    state = ParallelState.recorded(Grid(4, tp=4), 0)[0]
    with pytest.raises(ValueError, match=r"dimension 1 of \(2, 6, 5\) does not split over 4 ranks of tp"):
        LAYOUTS["mlp"].local_shape(state.tp)


def test_replicas_are_named() -> None:
    assert LAYOUTS["norm"].replica_axes == ("tp",)
    assert LAYOUTS["mlp"].replica_axes == ()
    assert LAYOUTS["experts"].replica_axes == ()
    assert ParamLayout((4, 3), splits={0: "ep"}, reduce_over="edp").replica_axes == ("etp",)
    assert LAYOUTS["head"].replica_axes == ("embedding",)


def fresh(layout: ParamLayout, state: ParallelState, seed: int = 1, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    meta = new_parameter(layout, *(state.axis(name) for name in layout.splits.values()), dtype=dtype)
    module = nn.Module()
    module.w = meta
    materialise(module, state, seed, torch.device("cpu"))
    parameter = module.get_parameter("w")
    assert layout_of(parameter) is layout
    return parameter


@pytest.mark.parametrize("cut", [None, 2.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_starts_with_its_part_of_the_same_tensor(name: str, cut: float | None) -> None:
    init = Init(std=0.5, cut=cut)
    layout = ParamLayout(**{**vars(LAYOUTS[name]), "init": init})
    layout_name = "layers.1.mlp.w1"

    def start(state: ParallelState) -> torch.Tensor:
        local = torch.empty(layout.local_shape(*(state.axis(axis) for axis in layout.splits.values())))
        local.placement = layout  # type: ignore[attr-defined]
        initialise(local, layout_name, state, 7)
        return local

    alone = ParallelState.alone()
    whole = {piece.name: piece.of(start(alone)) for piece in logical_pieces(layout_name, layout, alone)}
    for state in states(GRID)[::3]:
        local = start(state)
        for piece in logical_pieces(layout_name, layout, state):
            assert torch.equal(piece.of(local), whole[piece.name][region(piece)])
    assert len({tuple(tensor.flatten().tolist()) for tensor in whole.values()}) == len(whole)  # no two experts alike


def test_first_weights_follow_their_bell() -> None:
    state = ParallelState.alone()
    bell = fresh(ParamLayout((200, 100), init=Init(std=0.02)), state).detach()
    assert stats.kstest(bell.flatten().numpy() / 0.02, "norm").pvalue > 1e-3
    cut = fresh(ParamLayout((200, 100), init=Init(std=0.02, cut=2.0)), state).detach()
    assert float(cut.abs().max()) <= 2.0 * 0.02
    assert stats.kstest(cut.flatten().numpy() / 0.02, stats.truncnorm(-2, 2).cdf).pvalue > 1e-3
    assert bool((fresh(ParamLayout((3,), init=Init(constant=1.0)), state) == 1.0).all())
    assert not torch.equal(bell, fresh(ParamLayout((200, 100), init=Init(std=0.02)), state, seed=2))


def test_the_type_rounds_the_same_first_weights() -> None:
    layout, state = ParamLayout((5, 7), init=Init(std=0.02)), ParallelState.alone()
    wide = fresh(layout, state)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(fresh(layout, state, dtype=dtype), wide.to(dtype))


def test_large_tensors_are_filled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, state = LAYOUTS["qkv"], ParallelState.recorded(GRID, 5)[0]
    layout = ParamLayout(**{**vars(layout), "init": Init(std=1.0)})
    whole = fresh(layout, state)
    monkeypatch.setattr("megatron_moe.parallel.layout._CHUNK", 7)
    assert torch.equal(fresh(layout, state), whole)


def test_modules_in_modules_are_materialised_and_buffers_on_meta_refused() -> None:
    outer = nn.Module()
    outer.inner = nn.ModuleList([nn.Module(), nn.Module()])
    for module, layout in zip(outer.inner, itertools.repeat(ParamLayout((3,), init=Init(std=1.0))), strict=False):
        module.weight = new_parameter(layout, dtype=torch.float32)
    materialise(outer, ParallelState.alone(), 1, torch.device("cpu"))
    first, second = (parameter.detach() for parameter in outer.parameters())
    assert not first.is_meta and not torch.equal(first, second)  # keyed by their names
    outer.register_buffer("table", torch.empty(2, device="meta"))
    with pytest.raises(RuntimeError, match="buffer table was left on meta"):
        materialise(outer, ParallelState.alone(), 1, torch.device("cpu"))
