"""Small runs for the planner's tests."""

from collections.abc import Mapping
from typing import Any

from megatron_moe.config.run import RunConfig

VOCAB = 61
SPARSE = {"num_experts": 8, "layer_freq": "2", "ffn_hidden_size": 12, "aux_loss_coeff": 0.01}
ENCODER_DECODER = {
    "model": {"encoder_num_layers": 4, "position_embedding_type": "relative", "activation": "geglu_tanh"},
    "moe": {**SPARSE, "router_type": "st_moe", "extra_ffn": "after"},
    "encoder_moe": {**SPARSE, "router_type": "st_moe", "layer_freq": "4"},
}


def small(tables: Mapping[str, Mapping[str, Any]], parallel: Mapping[str, Any] | None = None) -> RunConfig:
    """Four layers of everything."""
    return RunConfig.from_dict(
        {
            **tables,
            "model": {
                "num_layers": 4,
                "hidden_size": 16,
                "num_attention_heads": 4,
                "ffn_hidden_size": 24,
                "vocab_size": VOCAB,
                "make_vocab_size_divisible_by": 8,
                **tables.get("model", {}),
            },
            "parallel": parallel or {},
            "data": {"seq_length": 16},
            "training": {"global_batch_size": 64, "train_iters": 2},
            "optimizer": {"lr": 0.01},
        }
    )
