"""Qwen3-MoE: sparse and dense layers in any order, queries and keys normalised in each head."""

from __future__ import annotations

from collections.abc import Mapping as TableMapping
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.convert.decoder import decoder_keys, decoder_mapping, read_decoder, read_router, shape_of
from megatron_moe.convert.family import ExpertNames, Family, ModelShape
from megatron_moe.convert.library_config import integer, refuse_unless, truth
from megatron_moe.convert.limits import common_obstacles, routing
from megatron_moe.convert.mapping import Mapping

BLOCK = "model.layers.{layer}.mlp"
EXPERT = BLOCK + ".experts.{expert}"


class Qwen3Moe(Family):
    """Qwen3MoeForCausalLM, model_type qwen3_moe."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    expert_names = ExpertNames(
        f"{BLOCK}.gate.weight", f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight", f"{EXPERT}.down_proj.weight"
    )

    def obstacles(self, shape: ModelShape) -> list[str]:
        """Another query-key norm than that of each head."""
        return common_obstacles(shape, qk_layernorm="head")

    def config_keys(self, shape: ModelShape) -> dict[str, Any]:
        """Experts under both keys: 5.23 reads one, 4.57 and 5.0 the other. Dense layers are always listed."""
        experts = shape.moe.num_experts
        return decoder_keys(shape) | {
            "attention_bias": False,
            "head_dim": shape.model.head_dim,
            "intermediate_size": shape.model.ffn_size,
            "moe_intermediate_size": shape.expert_size,
            "num_experts": experts,
            "num_local_experts": experts,
            "norm_topk_prob": routing(shape.moe).renormalised,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(shape.dense_layers),
            "sliding_window": None,
            "use_sliding_window": False,
        }

    def read_config(self, config: TableMapping[str, Any]) -> ModelShape:
        """Any Qwen3-MoE without a sliding window or biases."""
        refuse_unless(config, "use_sliding_window", False, why="and the project's attention has no window")
        model = read_decoder(config, rope_default=1e4, epsilon_default=1e-6) | {"qk_layernorm": "head"}
        moe = read_router(config, renormalised=truth(config, "norm_topk_prob", default=False))
        moe["ffn_hidden_size"] = integer(config, "moe_intermediate_size")
        moe["layer_freq"] = _layer_freq(config, model["num_layers"])
        return shape_of(model | {"ffn_hidden_size": integer(config, "intermediate_size")}, moe)

    def mapping(self, shape: ModelShape) -> Mapping:
        """The names of Llama's projections, in each expert and in dense layers."""
        return decoder_mapping(shape, self.expert_names)


def _layer_freq(config: TableMapping[str, Any], num_layers: int) -> str:
    """--moe-layer-freq of a config.json: the shortest way to write which layers are sparse."""
    step = integer(config, "decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(not isinstance(layer, int) for layer in dense):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r}, expected a list of layer numbers.")
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]
    if not any(sparse):
        raise ConfigError(
            f"config.json: mlp_only_layers {dense} and decoder_sparse_step {step} leave none of {num_layers} layers "
            f"sparse; a dense model is not imported."
        )
    for period in range(1, num_layers + 1):
        if sparse == [index % period == period - 1 for index in range(num_layers)]:
            return str(period)
    return ",".join("1" if one else "0" for one in sparse)
