"""Megatron's saved settings as ours, and the name of each that the project has nothing for."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.convert.family import ModelShape
from megatron_moe.convert.megatron.settings import MUST_BE, read_settings

DENSE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 128,
}
MOE: dict[str, Any] = {**DENSE, "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
SIGMOID: dict[str, Any] = {
    **MOE,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_topk": 4,
}


def read(arguments: dict[str, Any], **changes: Any) -> ModelShape:
    return read_settings({**arguments, **changes}, rows=256)


def test_a_dense_model() -> None:
    model = read(DENSE).model
    assert (model.num_layers, model.hidden_size, model.ffn_size, model.groups, model.head_dim) == (4, 32, 64, 2, 8)
    assert (model.rotary_base, model.norm_epsilon, model.activation) == (500000.0, 1e-6, "swiglu")
    assert (model.vocab_size, model.max_position_embeddings) == (256, 128)
    assert model.untie_embeddings_and_output_weights
    assert not read(DENSE).moe.num_experts
    # a number of groups that Megatron keeps, and does not use
    assert read(DENSE, group_query_attention=False, num_query_groups=1).model.groups == 4


@pytest.mark.parametrize(
    ("freq", "wanted"),
    [
        (1, "1"),
        (None, "1"),
        (2, "1,0,1,0"),
        (3, "1,0,0,1"),
        (4, "1,0,0,0"),
        ([0, 1, 1, 1], "0,1,1,1"),
        ([1, 1, 1, 1], "1"),
    ],
)
def test_every_nth_layer_is_the_first_of_n_in_megatron_and_the_last_in_ours(freq: Any, wanted: str) -> None:
    shape = read(MOE, moe_layer_freq=freq)
    assert shape.moe.layer_freq == wanted
    # as Megatron's own code has it
    pattern = [1 if index % freq == 0 else 0 for index in range(4)] if isinstance(freq, int) else freq or [1] * 4
    assert list(shape.moe.moe_layers(4)) == [bool(one) for one in pattern]


def test_routers() -> None:
    moe = read(MOE, moe_router_topk_scaling_factor=2.0, moe_router_pre_softmax=True, moe_aux_loss_coeff=0.01).moe
    assert (moe.router_type, moe.router_topk, moe.router_pre_softmax) == ("top_k", 2, True)
    assert moe.router_options == {"topk_scaling_factor": "2.0"}
    assert (moe.aux_loss_coeff, moe.expert_ffn_size(64)) == (0.01, 24)
    moe = read(SIGMOID, moe_router_num_groups=4, moe_router_group_topk=2, moe_router_bias_update_rate=0.002).moe
    assert moe.router_type == "deepseek_v3"
    assert moe.router_options == {
        "route_scale": "2.5",
        "bias_update_rate": "0.002",
        "num_groups": "4",
        "topk_groups": "2",
        "group_score_experts": "none",
    }
    moe = read(SIGMOID, moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-4).moe
    assert moe.router_options["sequence_loss_coeff"] == "0.0001"
    shared = read(MOE, moe_shared_expert_intermediate_size=48, moe_shared_expert_gate=True).moe
    assert (shared.shared_expert_intermediate_size, shared.shared_expert_gate) == (48, True)


def test_what_is_not_carried_over_is_told(caplog: pytest.LogCaptureFixture) -> None:
    moe = read(
        MOE, moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.01, moe_expert_capacity_factor=1.5
    ).moe
    assert moe.aux_loss_coeff == 0
    assert "global_aux_loss" in caplog.text
    assert "moe_expert_capacity_factor 1.5 is not carried over" in caplog.text


@pytest.mark.parametrize("name", sorted({name for name, _, _ in MUST_BE}))
def test_each_setting_that_changes_the_model_is_refused_by_name(name: str) -> None:
    allowed = next(values for key, values, _ in MUST_BE if key == name)
    other = not allowed[0] if isinstance(allowed[0], bool) else "else" if isinstance(allowed[-1], str) else 3
    with pytest.raises(ConfigError, match=f"args.{name} is {other!r}"):
        read(MOE, **{name: other})
    for value in allowed:
        if name not in ("normalization", "position_embedding_type"):
            read(MOE, **{name: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_layers": None}, "have no num_layers"),
        ({"hidden_size": "32"}, "args.hidden_size is '32', expected a whole number"),
        ({"swiglu": 1}, "args.swiglu is 1, expected true or false"),
        ({"rotary_base": "x"}, "args.rotary_base is 'x', expected a number"),
        ({"position_embedding_type": None}, "--position-embedding-type \"learned_absolute\""),
        ({"qk_layernorm": True, "normalization": "LayerNorm"}, "args.qk_layernorm with normalization"),
        ({"moe_layer_freq": [0, 1]}, "args.moe_layer_freq is \\[0, 1\\]"),
        ({"moe_layer_freq": [0, 0, 0, 0]}, "leaves no layer sparse"),
        ({"moe_layer_freq": 0}, "args.moe_layer_freq is 0"),
        ({"moe_router_score_function": "sqrtsoftplus"}, "args.moe_router_score_function"),
        ({"moe_router_score_function": "sigmoid"}, "without moe_router_enable_expert_bias"),
        ({"moe_router_num_groups": 2}, "args.moe_router_num_groups is 2"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
        ({"moe_router_force_load_balancing": True}, "args.moe_router_force_load_balancing"),
        ({"moe_router_topk": 9}, "--moe-router-topk 9"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read(MOE, **changes)
