"""How many parameters a model has, by formula, part by part; building it must give the same.

H, F, V, N, G, D, E, L as everywhere; a feed-forward layer has (branches + 1)·H·F, branches 2 with a gate.
"""

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.methods import find_method
from megatron_moe.moe.routers.st_moe import STMoERouter
from megatron_moe.moe.routers.switch import SwitchRouter
from megatron_moe.moe.routers.top_k import TopKRouter
from megatron_moe.ops.activation import ACTIVATIONS


def parameters(config: RunConfig, vocab_size: int) -> dict[str, int]:
    """Of the whole model, each counted once.   vocab_size: before padding.

    Raises ConfigError for a router of which there is no formula.
    """
    model = config.model
    total = dict.fromkeys(("attention", "dense feed-forward", "experts", "routers", "norms"), 0)
    for moe, layers in config.stacks:
        cross = moe is config.moe and model.encoder_num_layers > 0
        for part, number in _stack(model, moe, layers, cross).items():
            total[part] += number
    streams = len(config.stacks)
    total["norms"] += streams * _norm(model)
    tables = 1 + model.untie_embeddings_and_output_weights
    total["embedding and head"] = tables * model.padded_vocab_size(vocab_size) * model.hidden_size
    if model.position_embedding_type == "relative":
        total["relative positions"] = streams * model.relative_attention_num_buckets * model.num_attention_heads
    return {part: number for part, number in total.items() if number}


def _norm(model: ModelConfig) -> int:
    """Scale, and shift where there is one."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def _stack(model: ModelConfig, moe: MoEConfig, layers: int, cross: bool) -> dict[str, int]:
    """The layers of encoder or decoder.   cross: they look at the encoder too."""
    sparse = sum(moe.moe_layers(layers))
    extra = sparse if moe.extra_ffn != "none" else 0
    dense = _products(model.activation) * model.hidden_size * model.ffn_size
    return {
        "attention": layers * (2 if cross else 1) * _attention(model),
        "dense feed-forward": (layers - sparse + extra) * dense,
        "experts": sparse * _experts(model, moe),
        "routers": sparse * _router(model, moe),
        "norms": (layers * 2 + (layers if cross else 0) + extra) * _norm(model),
    }


def _products(activation: str) -> int:
    branches, _ = ACTIVATIONS[activation]
    return branches + 1


def _attention(model: ModelConfig) -> int:
    """Queries, keys, values and the way out, and what normalises queries and keys."""
    width, heads, groups = model.head_dim, model.num_attention_heads, model.groups
    normed = {"none": 0, "head": 2 * width, "projection": (heads + groups) * width}[model.qk_layernorm]
    return 2 * model.hidden_size * width * (heads + groups) + normed


def _experts(model: ModelConfig, moe: MoEConfig) -> int:
    """Of one layer, the shared one too."""
    width = moe.expert_ffn_size(model.ffn_size)
    one = _products(moe.activation or model.activation) * model.hidden_size * width
    bias = width if moe.expert_bias != "none" else 0
    shared = _products(model.activation) * model.hidden_size * (moe.shared_expert_intermediate_size or 0)
    gate = model.hidden_size if moe.shared_expert_gate else 0
    return moe.num_experts * (one + bias) + shared + gate


def _router(model: ModelConfig, moe: MoEConfig) -> int:
    """One row for each expert."""
    if not moe.num_experts:
        return 0
    if not issubclass(find_method(moe.router_type), TopKRouter | STMoERouter | SwitchRouter):
        raise ConfigError(
            f"{moe.flag('router_type')} {moe.router_type}: there is no formula of its parameters; use top_k, st_moe "
            f"or switch."
        )
    return moe.num_experts * model.hidden_size
