"""Mixtral: every layer sparse, no query-key norm, the chosen experts' weights add up to one."""

from __future__ import annotations

from collections.abc import Mapping as TableMapping
from typing import Any

from megatron_moe.convert.decoder import decoder_keys, decoder_mapping, read_decoder, read_router, shape_of
from megatron_moe.convert.family import ExpertNames, Family, ModelShape
from megatron_moe.convert.library_config import integer, refuse_unless
from megatron_moe.convert.limits import common_obstacles, dense_layer_obstacle, routing
from megatron_moe.convert.mapping import Mapping

BLOCK = "model.layers.{layer}.block_sparse_moe"
EXPERT = BLOCK + ".experts.{expert}"


class Mixtral(Family):
    """MixtralForCausalLM, model_type mixtral."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    expert_names = ExpertNames(
        f"{BLOCK}.gate.weight", f"{EXPERT}.w1.weight", f"{EXPERT}.w3.weight", f"{EXPERT}.w2.weight"
    )

    def obstacles(self, shape: ModelShape) -> list[str]:
        """Dense layers, query-key norms and weights that are not renormalised."""
        found = common_obstacles(shape, qk_layernorm="none")
        found += dense_layer_obstacle(shape.dense_layers, family="Mixtral")
        if not found and not routing(shape.moe).renormalised:
            found.append(
                "the weights of the chosen experts do not add up to one, but Mixtral's always do; use --model-type "
                "olmoe or qwen3_moe (both have query-key norms), or train without --moe-router-pre-softmax"
            )
        return found

    def config_keys(self, shape: ModelShape) -> dict[str, Any]:
        """Mixtral's own names for experts and widths."""
        experts = shape.moe.num_experts
        return decoder_keys(shape) | {
            "head_dim": shape.model.head_dim,
            "intermediate_size": shape.expert_size,
            "num_local_experts": experts,
            "num_experts": experts,
            "router_jitter_noise": 0.0,
            "sliding_window": None,
        }

    def read_config(self, config: TableMapping[str, Any]) -> ModelShape:
        """Any Mixtral without a sliding window."""
        refuse_unless(config, "sliding_window", None, why="and the project's attention has no window")
        model = read_decoder(config, rope_default=1e6, epsilon_default=1e-5)
        moe = read_router(config, renormalised=True)
        return shape_of(model, moe | {"ffn_hidden_size": integer(config, "intermediate_size")})

    def mapping(self, shape: ModelShape) -> Mapping:
        """w1 is the gate, w3 the up and w2 the down projection."""
        return decoder_mapping(shape, self.expert_names)
