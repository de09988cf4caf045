"""Counted by formula, and by building."""

from typing import Any

import pytest
from planning.models import ENCODER_DECODER, SPARSE, VOCAB, small

from megatron_moe.config.errors import ConfigError
from megatron_moe.models.build import build_stages, gpt_spec
from megatron_moe.parallel.state import ParallelState
from megatron_moe.planning.parameters import parameters

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "LayerNorm, own head, few key-value heads, heads of another width": {
        "model": {
            "normalization": "LayerNorm",
            "untie_embeddings_and_output_weights": True,
            "num_query_groups": 2,
            "kv_channels": 6,
            "activation": "gelu",
            "qk_layernorm": "projection",
        }
    },
    "sparse, with a bias, a shared expert and its gate": {
        "model": {"qk_layernorm": "head"},
        "moe": {**SPARSE, "expert_bias": "additive", "shared_expert_intermediate_size": 8, "shared_expert_gate": True},
    },
    "experts with another activation": {"moe": {**SPARSE, "activation": "relu", "router_type": "switch"}},
    "encoder-decoder": ENCODER_DECODER,
}


@pytest.mark.parametrize("model", MODELS)
def test_the_formula_counts_what_is_built(model: str) -> None:
    config = small(MODELS[model])
    stages = build_stages(gpt_spec(config, VOCAB), ParallelState.alone())
    built = sum(weight.numel() for stage in stages for weight in stage.parameters())
    assert sum(parameters(config, VOCAB).values()) == built


def test_a_router_without_a_formula_is_refused() -> None:
    with pytest.raises(ConfigError, match="--moe-router-type remoe: there is no formula"):
        parameters(small({"moe": {**SPARSE, "router_type": "remoe"}}), VOCAB)
