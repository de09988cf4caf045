"""What Mixtral, OLMoE and Qwen3-MoE share: Llama's attention and norms, SwiGLU experts, a top-k softmax router.

Letters: H hidden, N heads, G key-value heads, q = N/G, D head width, F feed-forward, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping as TableMapping
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.convert.family import ExpertNames, ModelShape
from megatron_moe.convert.library_config import integer, number, refuse_unless, rotary_base, truth
from megatron_moe.convert.limits import routing
from megatron_moe.convert.mapping import Mapping, Part, Rule, applied, padded_rows, stacked, whole

LAYER = "model.layers.{layer}"


def decoder_mapping(shape: ModelShape, experts: ExpertNames) -> Mapping:
    """All tensors, in the order of the model."""
    model = shape.model
    hidden, rows = model.hidden_size, shape.padded_vocab_size
    sparse = set(shape.sparse_layers)
    rules = [padded_rows("embedding.weight", (rows, hidden), "model.embed_tokens.weight", shape.vocab_size)]
    patterns = (attention_rules(model) + dense_rules(model), attention_rules(model) + expert_rules(shape, experts))
    for layer in range(model.num_layers):
        rules += applied(patterns[layer in sparse], layers=(layer,), num_experts=shape.moe.num_experts)
    rules.append(whole("final_norm.weight", (hidden,), "model.norm.weight"))
    if model.untie_embeddings_and_output_weights:
        rules.append(padded_rows("output.weight", (rows, hidden), "lm_head.weight", shape.vocab_size))
    return Mapping(tuple(rules))


def attention_rules(model: ModelConfig) -> list[Rule]:
    """Both norms and the attention of one layer; its rotary halves and head order are the project's own."""
    hidden, groups, width = model.hidden_size, model.groups, model.head_dim
    queries = model.num_attention_heads // groups
    ours, theirs = "layers.{layer}.attention", LAYER + ".self_attn"
    heads, kv = model.num_attention_heads * width, groups * width
    qkv = (
        Part(f"{theirs}.q_proj.weight", (heads, hidden), 1, 0, queries),
        Part(f"{theirs}.k_proj.weight", (kv, hidden), 1, queries, 1),
        Part(f"{theirs}.v_proj.weight", (kv, hidden), 1, queries + 1, 1),
    )
    rules = [
        whole("layers.{layer}.attention_norm.weight", (hidden,), LAYER + ".input_layernorm.weight"),
        Rule(f"{ours}.qkv", (groups, queries + 2, width, hidden), qkv),
        whole(f"{ours}.output", (hidden, groups, queries, width), f"{theirs}.o_proj.weight", (hidden, heads)),
        whole("layers.{layer}.mlp_norm.weight", (hidden,), LAYER + ".post_attention_layernorm.weight"),
    ]
    if model.qk_layernorm == "head":
        rules += [whole(f"{ours}.{x}_norm.weight", (width,), f"{theirs}.{x}_norm.weight") for x in "qk"]
    if model.qk_layernorm == "projection":
        rules += [
            whole(f"{ours}.q_norm.weight", (groups, queries, width), f"{theirs}.q_norm.weight", (heads,)),
            whole(f"{ours}.k_norm.weight", (groups, 1, width), f"{theirs}.k_norm.weight", (kv,)),
        ]
    return rules


def dense_rules(model: ModelConfig) -> list[Rule]:
    """The feed-forward of a dense layer, under Llama's names."""
    hidden, inner, mlp = model.hidden_size, model.ffn_size, LAYER + ".mlp"
    return [
        stacked("layers.{layer}.mlp.w1", (2, inner, hidden), f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        whole("layers.{layer}.mlp.w2", (hidden, inner), f"{mlp}.down_proj.weight"),
    ]


def expert_rules(shape: ModelShape, names: ExpertNames) -> list[Rule]:
    """Router and experts of a sparse layer."""
    hidden, inner, ours = shape.model.hidden_size, shape.expert_size, "layers.{layer}.mlp"
    return [
        whole(f"{ours}.router.weight", (shape.moe.num_experts, hidden), names.router),
        stacked(f"{ours}.experts.{{expert}}.w1", (2, inner, hidden), names.gate, names.up),
        whole(f"{ours}.experts.{{expert}}.w2", (hidden, inner), names.down),
    ]


def decoder_keys(shape: ModelShape) -> dict[str, Any]:
    """The keys of config.json that the three families share; the rotary base in the forms of both majors."""
    model, moe = shape.model, shape.moe
    base = float(model.rotary_base)
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.groups,
        "hidden_act": "silu",
        "rms_norm_eps": float(model.norm_epsilon),
        "rope_theta": base,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "initializer_range": float(model.init_method_std),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_dropout": 0.0,
        "num_experts_per_tok": routing(moe).choices,
        "output_router_logits": False,
        # the library's loss sums over choices and pools all layers: the nearest number, not the same loss
        "router_aux_loss_coef": float(moe.aux_loss_coeff),
        "use_cache": True,
    }


def read_decoder(config: TableMapping[str, Any], *, rope_default: float, epsilon_default: float) -> dict[str, Any]:
    """Fields of ModelConfig that the three families share; ConfigError for what the project has nothing for."""
    refuse_unless(config, "quantization_config", None, why="so its weights are packed")
    refuse_unless(config, "hidden_act", "silu", why="another activation than the project's SwiGLU")
    refuse_unless(config, "attention_bias", False, why="and the project's attention has no biases")
    refuse_unless(config, "clip_qkv", None, why="and the project does not clip queries, keys and values")
    refuse_unless(config, "partial_rotary_factor", 1.0, None, why="and the family rotates whole heads")
    heads = integer(config, "num_attention_heads")
    hidden = integer(config, "hidden_size")
    return {
        "num_layers": integer(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": integer(config, "num_key_value_heads", default=heads),
        "kv_channels": integer(config, "head_dim", default=hidden // heads),
        "max_position_embeddings": integer(config, "max_position_embeddings"),
        "rotary_base": rotary_base(config, default=rope_default),
        "norm_epsilon": number(config, "rms_norm_eps", default=epsilon_default),
        "init_method_std": number(config, "initializer_range", default=0.02),
        "untie_embeddings_and_output_weights": not truth(config, "tie_word_embeddings", default=False),
        "vocab_size": integer(config, "vocab_size"),
    }


def read_router(config: TableMapping[str, Any], *, renormalised: bool) -> dict[str, Any]:
    """Fields of MoEConfig for softmax over all experts and top-k, the k weights divided by their sum or not."""
    choices = integer(config, "num_experts_per_tok")
    if choices == 1 and renormalised:
        raise ConfigError(
            "config.json: num_experts_per_tok 1 with weights that are divided by their sum makes every weight 1 and "
            "leaves the router without a gradient; the project's routers refuse that."
        )
    return {
        "num_experts": integer(config, "num_experts", "num_local_experts"),
        "router_type": "top_k",
        "router_topk": choices,
        "router_pre_softmax": not renormalised,
    }


def shape_of(model: dict[str, Any], moe: dict[str, Any]) -> ModelShape:
    """The model of these fields; what they contradict is a ConfigError of their own."""
    config = ModelConfig(**model)
    moe_config = MoEConfig(**moe)
    if config.vocab_size is None:
        raise ConfigError("config.json has no vocab_size.")
    return ModelShape(model=config, moe=moe_config, vocab_size=config.vocab_size)
