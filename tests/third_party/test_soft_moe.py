"""Our Soft MoE gives soft-moe-pytorch's answers and gradients on the same weights.

That package mixes slots from its normalised tokens and gives each vector of length one a factor of sqrt(H) and a gain
of its own; ours mixes the tokens as they come and has one learned scale. With gains of one, its tokens normalised
beforehand and our scale at H, both compute the same.
"""

from typing import Any

import pytest
import torch
from layers.contexts import context
from moe_rows import token_info
from torch.nn import functional as F

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_unrouted
from megatron_moe.moe.unrouted.unrouted_layer import LayerSite, UnroutedLayer
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState

ALONE = ParallelState.alone()
HIDDEN, MULTIPLE = 6, 2


def their_layer(experts: int, slots: int) -> Any:
    package = pytest.importorskip("soft_moe_pytorch")
    layer = package.SoftMoE(HIDDEN, num_experts=experts, num_slots=slots, expert_mult=MULTIPLE).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):  # our experts have none
            torch.nn.init.zeros_(parameter)
    return layer


def our_layer(theirs: Any, experts: int, slots: int) -> UnroutedLayer:
    """With the other's weights."""
    config = MoEConfig(num_experts=experts, router_type="soft_moe", router_options={"slots": str(slots)})
    site = LayerSite(
        index=0,
        hidden_size=HIDDEN,
        ffn_size=MULTIPLE * HIDDEN,
        activation="gelu",
        init_std=1.0,
        output_std=1.0,
        dtype=torch.float64,
        state=ALONE,
    )
    layer = build_unrouted(config, site)
    materialise(layer, ALONE, 1, torch.device("cpu"))
    with torch.no_grad():
        layer.get_parameter("scale").fill_(HIDDEN)
        layer.get_parameter("phi").copy_(theirs.slot_embeds.flatten(0, 1))
        for number, expert in enumerate(theirs.experts.experts):
            layer.get_parameter("experts.w1")[number, 0].copy_(expert[0].weight)
            layer.get_parameter("experts.w2")[number].copy_(expert[3].weight)
    return layer


@pytest.mark.parametrize(("experts", "slots", "length", "samples"), [(4, 1, 5, 1), (3, 2, 7, 2), (2, 4, 8, 3)])
def test_answers_and_gradients_of_soft_moe_pytorch(experts: int, slots: int, length: int, samples: int) -> None:
    torch.manual_seed(experts)
    theirs = their_layer(experts, slots)
    ours = our_layer(theirs, experts, slots)
    tokens = torch.randn(samples, length, HIDDEN, dtype=torch.float64, requires_grad=True)
    wanted = theirs(tokens)
    rows = (F.normalize(tokens, dim=-1) * HIDDEN**0.5).transpose(0, 1).flatten(0, 1)
    found = ours.mix(rows, token_info(length, samples), context(length, samples, ALONE)).answers
    found = found.view(length, samples, HIDDEN).transpose(0, 1)
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((out * cotangent).sum(), tokens)[0] for out in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_padding_has_no_say_in_either() -> None:
    torch.manual_seed(0)
    theirs = their_layer(3, 2)
    ours = our_layer(theirs, 3, 2)
    tokens = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    rows = (F.normalize(tokens, dim=-1) * HIDDEN**0.5).transpose(0, 1).flatten(0, 1)
    info = token_info(6, 2, padding=[(4, 1), (5, 1)])
    found = ours.mix(rows, info, context(6, 2, ALONE)).answers.view(6, 2, HIDDEN).transpose(0, 1)
    torch.testing.assert_close(found[mask], theirs(tokens, mask=mask)[mask])
