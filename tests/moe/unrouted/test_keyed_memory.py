"""VanillaM and LoRKM: which cells, which weights, and what they are equal to."""

from typing import Any

import pytest
import torch
from layer_checks import ask, draw
from moe.unrouted.memories import fill, make_memory, plain
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.moe.unrouted.memory import MemoryLayer

VANILLA: dict[str, Any] = {"router_type": "vanilla_memory", "activation": "relu"}


def worked(active: int, activation: str = "relu") -> MemoryLayer:
    """Eight cells in four experts of two, for tokens of width 2."""
    options = {"active_cells": str(active)}
    fields = {**VANILLA, "activation": activation, "ffn_hidden_size": 2, "router_options": options}
    layer = make_memory(fields, hidden=2)
    keys = [[1, 0], [0, 1], [2, -1], [1, 1], [-1, 0], [0, -2], [0.5, 0.5], [1.5, -0.5]]
    values = [[1, 0], [0, 1], [1, 1], [0, 2], [1, 0], [1, 1], [2, 0], [0, 1]]
    fill(layer, keys=keys, values=values)
    return layer


@pytest.mark.parametrize(
    ("active", "answer"),
    # x = (1, .5): scores 1, .5, 1.5, 1.5, -1, -1, .75, 1.25
    [
        (1, [1.5, 1.5]),  # of two equal ones the lower
        (2, [1.5, 4.5]),
        (3, [1.5, 5.75]),
        (4, [2.5, 5.75]),
        (8, [4.0, 6.25]),  # all, of which relu lets six through
    ],
)
def test_worked_example(active: int, answer: list[float]) -> None:
    mixed = ask(worked(active), torch.tensor([[1.0, 0.5]], dtype=torch.float64))
    assert mixed.answers.tolist() == [pytest.approx(answer)]


def test_uses_are_counted_by_runs_of_cells() -> None:
    mixed = ask(worked(3), torch.tensor([[1.0, 0.5], [-1.0, 0.0]], dtype=torch.float64))
    # the second token's scores are -1, 0, -2, -1, 1, 0, -.5, -1.5: cells 4, then 1 and 5
    assert mixed.report.stats["tokens_per_expert"].tolist() == [1, 2, 2, 1]


def test_the_choice_is_by_pre_activation_even_where_the_activation_is_zero() -> None:
    mixed = ask(worked(1), torch.tensor([[-1.0, -1.0]], dtype=torch.float64))
    # scores -1, -1, -1, -2, 1, 2, ...: cell 5, not one at which relu is 0
    assert mixed.answers.tolist() == [[2.0, 2.0]]
    # gelu is lower at -1 than at -4, but -1 is the better score
    layer = worked(1, "gelu")
    fill(layer, keys=[[-4.0, 0.0]] * 7 + [[-1.0, 0.0]], values=[[0.0, 0.0]] * 7 + [[1.0, 0.0]])
    answer = ask(layer, torch.tensor([[1.0, 0.0]], dtype=torch.float64)).answers
    assert answer.tolist() == [pytest.approx([-0.158655, 0.0], abs=1e-6)]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_all_cells_make_a_dense_feed_forward_layer(activation: str) -> None:
    layer = make_memory({**VANILLA, "activation": activation, "router_topk": 4})
    tokens = draw(7)
    inner = tokens @ layer.get_parameter("keys").t()
    dense = (F.relu(inner) if activation == "relu" else F.gelu(inner)) @ layer.get_parameter("values")
    torch.testing.assert_close(ask(layer, tokens).answers, dense)


def by_hand(layer: MemoryLayer, keys: Tensor, activation: str, active: int, token: Tensor) -> list[float]:
    """The definition, cell by cell."""
    scores = [float(token @ key) for key in keys]
    best = sorted(range(len(scores)), key=lambda cell: (-scores[cell], cell))[:active]
    values = layer.get_parameter("values").tolist()
    return [sum(plain(activation, scores[cell]) * values[cell][column] for cell in best) for column in range(6)]


@pytest.mark.parametrize(("active", "activation"), [(1, "relu"), (5, "gelu"), (15, "gelu")])
def test_both_follow_the_definition(active: int, activation: str) -> None:
    options = {"active_cells": str(active)}
    vanilla = make_memory({**VANILLA, "activation": activation, "router_options": options})
    low_rank = make_memory(
        {"router_type": "low_rank_keys", "activation": activation, "router_options": {**options, "rank": "3"}}
    )
    short = low_rank.get_parameter("keys") @ low_rank.get_parameter("down")
    for layer, keys in ((vanilla, vanilla.get_parameter("keys")), (low_rank, short)):
        tokens = draw(5)
        wanted = [by_hand(layer, keys.detach(), activation, active, token) for token in tokens]
        assert ask(layer, tokens).answers.tolist() == [pytest.approx(row) for row in wanted]


def test_low_rank_keys_of_full_rank_are_keys() -> None:
    fields = {"activation": "relu", "router_options": {"active_cells": "5"}}
    vanilla = make_memory({"router_type": "vanilla_memory", **fields})
    options = {"active_cells": "5", "rank": "6"}
    low_rank = make_memory({"router_type": "low_rank_keys", "activation": "relu", "router_options": options})
    fill(low_rank, down=torch.eye(6), keys=vanilla.get_parameter("keys"), values=vanilla.get_parameter("values"))
    torch.testing.assert_close(ask(low_rank, draw(9)).answers, ask(vanilla, draw(9)).answers)


def test_scores_start_about_as_large_with_short_keys() -> None:
    sizes = []
    for name, options in (("vanilla_memory", {}), ("low_rank_keys", {"rank": "16"})):
        layer = make_memory(
            {"router_type": name, "activation": "relu", "ffn_hidden_size": 64, "router_options": options}, hidden=48
        )
        keys = layer.get_parameter("keys")
        whole = keys if name == "vanilla_memory" else keys @ layer.get_parameter("down")
        sizes.append(whole.std().item())
    assert sizes == pytest.approx([0.5, 0.5], rel=0.1)


@pytest.mark.parametrize("name", ["vanilla_memory", "low_rank_keys"])
def test_bfloat16_cells_are_scored_in_float32(name: str) -> None:
    # 128.5 is 128 in bfloat16, where the first cell would win
    options = {"active_cells": "1", **({"rank": "2"} if name == "low_rank_keys" else {})}
    layer = make_memory(
        {"router_type": name, "activation": "relu", "router_options": options}, hidden=2, dtype=torch.bfloat16
    )
    fill(
        layer, keys=[[128.0, 0.0]] * 9 + [[128.0, 0.5]] + [[0.0, 0.0]] * 6, values=[[float(c), 1.0] for c in range(16)]
    )
    if name == "low_rank_keys":
        fill(layer, down=torch.eye(2))
    answers = ask(layer, torch.ones(1, 2, dtype=torch.bfloat16)).answers
    assert answers.dtype == torch.bfloat16
    assert answers[0, 0].item() == pytest.approx(9 * 128.5, rel=0.01)
