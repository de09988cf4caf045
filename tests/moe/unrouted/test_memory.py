"""What every memory of single cells is held to, beyond what every layer of the registry is: its reads and options."""

from typing import Any

import pytest
from layer_checks import ask, draw, info_for
from moe.unrouted.memories import CASES, make_memory

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.moe.unrouted.memory import MemoryLayer
from megatron_moe.moe.unrouted.registry import UNROUTED
from megatron_moe.training.validate import validate

each_case = pytest.mark.parametrize("name", CASES)


def test_every_memory_of_the_registry_is_checked() -> None:
    memories = {name for name, layer in UNROUTED.items() if issubclass(layer, MemoryLayer)}
    assert {fields["router_type"] for fields in CASES.values()} == memories


@each_case
def test_counts_are_of_real_tokens_only(name: str) -> None:
    layer = make_memory(CASES[name])
    stats = ask(layer, draw(18), info_for(layer)).report.stats
    reads = {
        "vanilla_memory": 4,
        "vanilla_memory, 7 cells": 7,
        "low_rank_keys": 3,
        "product_keys": 6,
        "product_keys, batch": 8,
        "product_keys, 36 cells": 9,
        "product_keys_ffn": 8,
        "controller": 4,
        "controller, no noise": 8,
    }
    assert stats["tokens_per_expert"].shape == (4,)
    assert int(stats["tokens_per_expert"].sum()) == 14 * reads[name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "vanilla_memory"}, r"swiglu has a gate, .* give --moe-activation gelu or relu\."),
        ({"router_type": "low_rank_keys", "activation": "geglu"}, r"geglu has a gate"),
        ({"router_type": "controller"}, r"swiglu has a gate"),
        ({"router_type": "product_keys_ffn"}, r"swiglu has a gate"),
        ({"router_type": "product_keys", "activation": "relu"}, r"--moe-activation \"relu\" has no effect"),
        ({**CASES["vanilla_memory"], "aux_loss_coeff": 0.1}, r"--moe-aux-loss-coeff 0.1 has no effect"),
        ({**CASES["controller"], "expert_capacity_factor": 1.0}, r"--moe-expert-capacity-factor 1.* has no effect"),
        (
            {**CASES["controller"], "token_dispatcher_type": "local"},
            r"--moe-token-dispatcher-type \"local\" has no effect",
        ),
        (
            {**CASES["vanilla_memory, 7 cells"], "router_topk": 1},
            r"--moe-router-topk 1 has no effect .* active_cells=7",
        ),
        (
            {**CASES["vanilla_memory"], "router_topk": 2, "router_options": {"active_cells": "65"}},
            r"active_cells=65 asks for more than the memory's 64 cells; use 64 or fewer\.",
        ),
        ({**CASES["vanilla_memory"], "router_options": {"rank": "3"}}, r"no such option"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config({"ffn_hidden_size": 16, **fields}, {}, {}))
