"""What a family cannot express is refused by name, with the way out."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.convert.limits import Routing, routing
from megatron_moe.convert.registry import FAMILIES, family_for, family_of
from tests.convert.samples import run_of, shape_of


def refusal(family: str, model_type: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        family_for(shape_of(run_of(family, **changes)), model_type)
    return str(caught.value)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("model", "position_embedding_type", "none", "--position-embedding-type none"),
        ("model", "rotary_percent", 0.5, "--rotary-percent 0.5"),
        ("model", "encoder_num_layers", 2, "--encoder-num-layers 2: the family is a decoder alone"),
        ("model", "normalization", "LayerNorm", "--normalization LayerNorm"),
        ("model", "activation", "geglu", "--activation geglu: the family's experts are SwiGLU; train with --swiglu"),
        ("model", "activation", "gelu", "--activation gelu"),
        ("moe", "shared_expert_intermediate_size", 16, "--moe-shared-expert-intermediate-size 16"),
        ("moe", "router_type", "expert_choice", "--moe-router-type expert_choice"),
        ("moe", "router_type", "st_moe", "eval_policy=all"),
        ("moe", "router_options", {"topk_scaling_factor": "2.0"}, "--moe-router-options topk_scaling_factor=2.0"),
        ("moe", "router_options", {"unheard_of": "1"}, "--moe-router-options unheard_of=1"),
    ],
)
def test_every_family_names_what_it_cannot_express(family: str, section: str, name: str, value: Any, told: str) -> None:
    found = refusal(family, family, **{section: {name: value}})
    assert found.startswith(f"{family} cannot express this model")
    assert told in found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_family_has_its_own_query_key_norm(family: str) -> None:
    for other in FAMILIES:
        if other != family:
            assert "--qk-layernorm" in refusal(other, family, model={"kv_channels": 8}, moe={"layer_freq": "1"})


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_dense_layers_point_to_the_family_that_has_them(family: str) -> None:
    found = refusal(family, family, model={"num_layers": 6}, moe={"layer_freq": "6"})
    assert "layers 0, 1, 2, 3, ... are dense" in found
    assert "--model-type qwen3_moe" in found


def test_mixtral_refuses_weights_that_do_not_add_up_to_one() -> None:
    assert "do not add up to one" in refusal("mixtral", "mixtral", moe={"router_pre_softmax": True})


def test_olmoe_refuses_heads_of_another_width() -> None:
    assert "--kv-channels 12" in refusal("olmoe", "olmoe", model={"kv_channels": 12})


def test_a_dense_model_is_refused() -> None:
    assert "it has no MoE layer" in refusal("mixtral", "mixtral", moe={"num_experts": 0})


def test_auto_tells_what_no_family_has() -> None:
    found = refusal("mixtral", "auto", model={"activation": "gelu"})
    assert found.startswith("no Hugging Face family can express this model: --activation gelu")
    assert "--qk-layernorm" not in found


def test_auto_tells_the_first_obstacle_of_each_family_when_none_is_shared() -> None:
    found = refusal("mixtral", "auto", model={"num_layers": 4}, moe={"layer_freq": "2"})
    assert "as mixtral: layers 0, 2 are dense" in found
    assert "as qwen3_moe: --qk-layernorm none" in found


def test_unknown_types_are_refused() -> None:
    assert "--model-type llama: expected auto or one of mixtral" in refusal("mixtral", "llama")
    for config in ({}, {"model_type": None}, {"model_type": ["mixtral"]}, {"model_type": "t5"}):
        with pytest.raises(ConfigError, match="only mixtral, olmoe, qwen3_moe can be imported"):
            family_of(config)


def test_an_option_at_its_neutral_value_is_no_obstacle() -> None:
    run = run_of("mixtral", moe={"router_options": {"topk_scaling_factor": "1.0", "balance": "normalised"}})
    assert family_for(shape_of(run), "mixtral") is FAMILIES["mixtral"]


@pytest.mark.parametrize(
    ("moe", "wanted"),
    [
        ({}, Routing(2, True)),
        ({"router_pre_softmax": True}, Routing(2, False)),
        ({"router_pre_softmax": True, "router_options": {"renormalise": " True "}}, Routing(2, True)),
        ({"router_pre_softmax": True, "router_options": {"renormalise": "none"}}, Routing(2, False)),
        ({"router_options": {"renormalise": "none"}}, Routing(2, True)),
    ],
)
def test_renormalising_is_read_as_the_router_reads_it(moe: dict[str, Any], wanted: Routing) -> None:
    assert routing(run_of("mixtral", moe=moe).moe) == wanted
