"""Which layers stand in which stage."""

import pytest

from megatron_moe.pipeline.partition import parts_of, stage_layers


def test_uneven_and_empty_stages_stand_in_order() -> None:
    assert parts_of([2, 0, 3]) == [range(2), range(2, 2), range(2, 5)]
    assert parts_of([0, 4, 0]) == [range(0), range(4), range(4, 4)]


def test_by_hand() -> None:
    assert stage_layers(4, 1) == [range(4)]
    assert stage_layers(4, 2) == [range(2), range(2, 4)]
    # one left over: to a middle stage; two: both middle ones; three: the first as well, never the last
    assert [len(layers) for layers in stage_layers(9, 4)] == [2, 3, 2, 2]
    assert [len(layers) for layers in stage_layers(10, 4)] == [2, 3, 3, 2]
    assert [len(layers) for layers in stage_layers(11, 4)] == [3, 3, 3, 2]
    assert [len(layers) for layers in stage_layers(3, 2)] == [2, 1]


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_every_layer_stands_in_one_stage_in_order_and_sizes_differ_by_one_at_most(num_stages: int) -> None:
    for num_layers in range(num_stages, 30):
        parts = stage_layers(num_layers, num_stages)
        assert [layer for part in parts for layer in part] == list(range(num_layers))
        sizes = [len(part) for part in parts]
        assert len(sizes) == num_stages and max(sizes) - min(sizes) <= 1
        assert sizes[-1] == min(sizes)


def test_a_stage_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot fill 4 pipeline stages"):
        stage_layers(3, 4)
