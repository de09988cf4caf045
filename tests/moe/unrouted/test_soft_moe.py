"""Soft MoE against loops: slots are means of tokens, answers means of slots, a group for itself, padding nowhere."""

import math
from typing import Any

import pytest
import torch
from layer_checks import HIDDEN
from moe.unrouted.soft_layers import EXPERTS, answers, draw, expert_by_hand, make_layer
from moe_rows import token_info
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.soft_moe import SoftMoELayer


def soft(slots: int = 2, **fields: object) -> SoftMoELayer:
    layer = make_layer("soft_moe", router_options={"slots": str(slots)}, **fields)
    assert isinstance(layer, SoftMoELayer)
    with torch.no_grad():
        layer.scale.fill_(2.5)
    return layer


def by_loops(layer: SoftMoELayer, tokens: Tensor, info: TokenInfo) -> Tensor:
    """The paper's formulas, one group after the other."""
    slots = layer.options.slots
    unit = [phi / phi.norm() for phi in layer.phi]
    out = torch.zeros_like(tokens)
    for group in range(info.num_groups):
        rows = [t for t in range(len(tokens)) if info.groups[t] == group and not info.is_padding[t]]
        logits = {t: [float(layer.scale) * float(tokens[t] / tokens[t].norm() @ phi) for phi in unit] for t in rows}
        outputs = []
        for m in range(EXPERTS * slots):
            powers = {t: math.exp(logits[t][m]) for t in rows}
            mean = sum((powers[t] * tokens[t] for t in rows), torch.zeros(HIDDEN).double()) / sum(powers.values())
            outputs.append(expert_by_hand(layer, m // slots, mean))
        for t in rows:
            powers_of_slots = [math.exp(value) for value in logits[t]]
            for power, output in zip(powers_of_slots, outputs, strict=True):
                out[t] += power / sum(powers_of_slots) * output
    return out


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("group_samples", [1, 2])
def test_it_is_the_papers_formula(group_samples: int) -> None:
    info = token_info(5, 3, group_samples=group_samples, padding=[(4, 0), (0, 2)])
    tokens = draw(15)
    layer = soft(routing_group_samples=group_samples)
    found = answers(layer, tokens, info, samples=3)
    real = ~info.is_padding
    torch.testing.assert_close(found[real], by_loops(layer, tokens, info)[real])


def test_the_worked_example_without_norms() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5]])
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    dispatch, combine = logits.softmax(dim=0), logits.softmax(dim=1)
    slots = dispatch.t() @ tokens
    answer = combine @ (slots * torch.tensor([[2.0], [3.0]]))
    torch.testing.assert_close(
        answer, torch.tensor([[1.3172, 1.2159], [0.8773, 2.4590], [0.9228, 2.3305]]), atol=1e-4, rtol=1e-4
    )


def test_equal_tokens_get_equal_answers() -> None:
    tokens = draw(4)
    tokens[1] = tokens[0]
    found = answers(soft(), tokens, token_info(4), samples=1)
    torch.testing.assert_close(found[0], found[1])


def test_noise_is_drawn_by_token() -> None:
    layer = make_layer("soft_moe", router_options={"slots": "2", "noise_std": "1.0"})
    # equal samples draw by themselves
    pair = answers(layer, draw(4).repeat_interleave(2, dim=0), token_info(4, 2), samples=2).view(4, 2, HIDDEN)
    assert not torch.allclose(pair[:, 0], pair[:, 1])


def test_logits_are_cosines_at_first() -> None:
    assert make_layer("soft_moe").get_parameter("scale").tolist() == [1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_topk": 3}, r"--moe-router-topk 3 has no effect with the router soft_moe"),
        ({"expert_capacity_factor": 1.0}, r"--moe-expert-capacity-factor 1.* has no effect"),
    ],
)
def test_what_has_no_effect_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_layer("soft_moe", **fields)
