"""The layouts made by rule are all pairs that are legal, each once, on ranks that hold them."""

import itertools

import pytest

from megatron_moe.certify.combinations import (
    AXES,
    EXTENTS,
    SPLITTING,
    TIMING,
    Choice,
    _identity,
    combinations,
    combine,
    layouts,
)
from megatron_moe.certify.layouts import CP, EP, ETP, LAYOUTS, PP, TP, Layout
from megatron_moe.certify.tiny_model import GLOBAL_BATCH
from megatron_moe.parallel.grid import Grid


def _grid(layout: Layout) -> Grid:
    tp, pp, cp, ep = (int(layout.parallel.get(name, 1)) for name in (TP, PP, CP, EP))
    return Grid(layout.ranks, tp=tp, cp=cp, pp=pp, ep=ep, etp=int(layout.parallel.get(ETP, tp)))


@pytest.mark.parametrize("extent", EXTENTS)
def test_every_layout_has_a_grid_and_microbatches_for_its_ranks(extent: str) -> None:
    for name, layout in layouts(extent).items():
        assert layout.ranks <= 8, name
        assert GLOBAL_BATCH % (_grid(layout).dp * layout.micro_batch_size) == 0, name


@pytest.mark.parametrize("extent", EXTENTS)
def test_no_layout_comes_twice_and_the_special_ones_come_first(extent: str) -> None:
    found = layouts(extent)
    special = [name for name, layout in LAYOUTS.items() if extent != "quick" or layout.ranks <= 2]
    assert list(found)[: len(special)] == special
    assert all(found[name] == LAYOUTS[name] for name in special)
    # a tensor size is an expert tensor size, and sequence parallelism, unless something else is said
    plain = {
        (layout.ranks, layout.micro_batch_size, layout.uneven, str(sorted(map(str, layout.parallel.items()))))
        for layout in found.values()
    }
    assert len(plain) == len(found)
    assert "DP 2" not in found and "TP 2 x ETP 2" not in found


def test_each_extent_holds_the_one_before() -> None:
    quick, default, full = (layouts(extent) for extent in EXTENTS)
    assert set(quick) < set(default) < set(full)


def test_every_pair_of_values_of_two_axes_is_there_or_says_nothing() -> None:
    found = {_identity(layout) for layout in layouts("default").values()}
    nothing = []
    for one, other in itertools.combinations(AXES.values(), 2):
        for pair in itertools.product(one, other):
            layout = combine(pair)
            if layout is None:
                nothing.append({choice.name for choice in pair})
            else:
                assert _identity(layout) in found, pair
    # the split that everything follows anyway, a schedule without a pipeline, more ranks than samples or layers
    allowed = {"ETP 1", "ETP 2", "EP 4", "CP 4", "PP 4", "micro-batches of 2", "DP 2 with ZeRO-3"}
    allowed |= {choice.name for choice in TIMING["schedule"]}
    assert all(pair & allowed for pair in nothing), nothing
    names = set(layouts("default"))
    assert {"TP 2 x PP 2", "PP 4 x CP 2", "EP 2 x DP 2 without ZeRO-1", "PP 4, ZB-H1"} <= names


def test_a_combination_takes_the_fewest_ranks() -> None:
    choices = {choice.name: choice for values in AXES.values() for choice in values}

    def ranks(*names: str) -> int | None:
        layout = combine([choices[name] for name in names])
        return None if layout is None else layout.ranks

    assert ranks("EP 2") == 2 and ranks("EP 2", "DP 2") == 4
    assert ranks("CP 2", "EP 2") == 2  # folded
    assert ranks("TP 2", "EP 2") == 4 and ranks("TP 2", "EP 2", "ETP 1") == 2
    assert ranks("TP 2", "PP 2", "CP 2") == 8 and ranks("TP 2", "PP 4", "CP 2") is None
    assert ranks("ETP 1") is None and ranks("sequential") is None  # nothing changes
    assert ranks("EP 4", "DP 2") is None  # eight copies of the model, and four samples


def test_names_tell_splits_first() -> None:
    axes = [(Choice("recomputation", {"recompute_granularity": "full"}),), SPLITTING["tensor"][:1]]
    assert list(combinations(axes, (2,))) == ["TP 2, recomputation"]
