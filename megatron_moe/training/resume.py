"""What must not change between the two halves of a run, or it would not be one run."""

from collections.abc import Mapping
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sections import all_settings
from megatron_moe.config.values import written

WAY_OUT = "Give this run the same, or start a new run from its weights with --finetune."


def check_same_run(saved: RunConfig, now: RunConfig, source: str) -> None:
    """Raises ConfigError with every option that makes another model, or another order of samples, than was saved."""
    before, after = _resolved(saved), _resolved(now)
    changed = [
        f"{all_settings()[key].flag} was {written(before[key])} and is {written(after[key])}"
        for key in before
        if key in after and before[key] != after[key]
    ]
    if changed:
        raise ConfigError(f"the run in {source} is another one: {'; '.join(changed)}. {WAY_OUT}")


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, str], source: str) -> None:
    """Raises ConfigError unless the fingerprints of tokenizer and corpus are those that were saved."""
    changed = [name for name, value in now.items() if saved.get(name, value) != value]
    if changed:
        raise ConfigError(f"the run in {source} was started with another {' and another '.join(changed)}. {WAY_OUT}")


def _resolved(run: RunConfig) -> dict[str, Any]:
    """The values that the model's function and the order of samples follow from, however they were written."""
    model, moe, data = run.model, run.moe, run.data
    values: dict[str, Any] = {
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.groups,
        "model.kv_channels": model.head_dim,
        "model.position_embedding_type": model.position_embedding_type,
        "model.rotary_base": model.rotary_base,
        "model.rotary_percent": model.rotary_percent,
        "model.normalization": model.normalization,
        "model.norm_epsilon": model.norm_epsilon,
        "model.activation": model.activation,
        "model.qk_layernorm": model.qk_layernorm,
        "model.untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "moe.num_experts": moe.num_experts,
        "data.seq_length": data.seq_length,
        "data.split": data.split_fractions,
        "data.data_path": data.weights,
        "training.seed": run.training.seed,
    }
    if moe.num_experts:
        values |= {
            "moe.layer_freq": moe.moe_layers(model.num_layers),
            "moe.ffn_hidden_size": moe.expert_ffn_size(model.ffn_size),
            "moe.router_type": moe.router_type,
            "moe.router_topk": moe.router_topk,
            "moe.shared_expert_intermediate_size": moe.shared_expert_intermediate_size,
            "moe.shared_expert_gate": moe.shared_expert_gate,
            "moe.routing_group_samples": moe.routing_group_samples,
        }
    return values
