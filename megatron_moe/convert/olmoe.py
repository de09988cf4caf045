"""OLMoE: every layer sparse, queries and keys normalised over the whole projection."""

from __future__ import annotations

from collections.abc import Mapping as TableMapping
from typing import Any

from megatron_moe.convert.decoder import decoder_keys, decoder_mapping, read_decoder, read_router, shape_of
from megatron_moe.convert.family import ExpertNames, Family, ModelShape
from megatron_moe.convert.library_config import integer, truth
from megatron_moe.convert.limits import common_obstacles, dense_layer_obstacle, routing
from megatron_moe.convert.mapping import Mapping

BLOCK = "model.layers.{layer}.mlp"
EXPERT = BLOCK + ".experts.{expert}"


class Olmoe(Family):
    """OlmoeForCausalLM, model_type olmoe."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    expert_names = ExpertNames(
        f"{BLOCK}.gate.weight", f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight", f"{EXPERT}.down_proj.weight"
    )

    def obstacles(self, shape: ModelShape) -> list[str]:
        """Dense layers, another query-key norm, and heads of a width of their own."""
        found = common_obstacles(shape, qk_layernorm="projection")
        found += dense_layer_obstacle(shape.dense_layers, family="OLMoE")
        model = shape.model
        # transformers 4.x has no key for it and would build other shapes
        if model.head_dim * model.num_attention_heads != model.hidden_size:
            found.append(
                f"--kv-channels {model.head_dim}: an OLMoE head is hidden size / heads wide; leave --kv-channels out"
            )
        return found

    def config_keys(self, shape: ModelShape) -> dict[str, Any]:
        """OLMoE's own names for experts and widths."""
        experts = shape.moe.num_experts
        return decoder_keys(shape) | {
            "attention_bias": False,
            "clip_qkv": None,
            "intermediate_size": shape.expert_size,
            "num_experts": experts,
            "num_local_experts": experts,
            "norm_topk_prob": routing(shape.moe).renormalised,
        }

    def read_config(self, config: TableMapping[str, Any]) -> ModelShape:
        """Any OLMoE without clipping or biases."""
        model = read_decoder(config, rope_default=1e4, epsilon_default=1e-5) | {"qk_layernorm": "projection"}
        moe = read_router(config, renormalised=truth(config, "norm_topk_prob", default=False))
        return shape_of(model, moe | {"ffn_hidden_size": integer(config, "intermediate_size")})

    def mapping(self, shape: ModelShape) -> Mapping:
        """The names of Llama's projections, in each expert."""
        return decoder_mapping(shape, self.expert_names)
