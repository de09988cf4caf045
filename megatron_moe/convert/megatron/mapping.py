"""Which tensor of Megatron-Core's GPTModel each of ours is; all are the same numbers in the same order.

linear_qkv: for each group its query heads, its key, its value.   linear_fc1: gate above up.
Letters: H hidden, G key-value groups, q heads of a group, D head width, F feed-forward, E experts, V vocabulary.
"""

from __future__ import annotations

from megatron_moe.config.model import ModelConfig
from megatron_moe.convert.family import ModelShape
from megatron_moe.convert.mapping import Mapping, Rule, applied, padded_rows, whole

LAYER = "decoder.layers.{layer}"
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
# inner branches of the activations that both have
BRANCHES = {"swiglu": 2, "gelu": 1}


def megatron_mapping(shape: ModelShape) -> Mapping:
    """All tensors, in the order of the model."""
    model, hidden = shape.model, shape.model.hidden_size
    rows = (shape.padded_vocab_size, hidden)
    sparse = set(shape.sparse_layers)
    rules = [padded_rows("embedding.weight", rows, EMBEDDING, shape.vocab_size)]
    patterns = (attention_rules(model) + dense_rules(model), attention_rules(model) + expert_rules(shape))
    for layer in range(model.num_layers):
        rules += applied(patterns[layer in sparse], layers=(layer,), num_experts=shape.moe.num_experts)
    rules += norm_rules(model, "final_norm", "decoder.final_layernorm")
    if model.untie_embeddings_and_output_weights:
        rules.append(padded_rows("output.weight", rows, HEAD, shape.vocab_size))
    return Mapping(tuple(rules))


def norm_rules(model: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    """Weight, and the bias of a LayerNorm."""
    words = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    return [whole(f"{ours}.{word}", (model.hidden_size,), f"{theirs}.{word}") for word in words]


def attention_rules(model: ModelConfig) -> list[Rule]:
    """Both norms and the attention of one layer."""
    hidden, groups, width = model.hidden_size, model.groups, model.head_dim
    queries = model.num_attention_heads // groups
    ours, theirs = "layers.{layer}.attention", LAYER + ".self_attention"
    qkv, heads = (groups, queries + 2, width, hidden), (hidden, groups, queries, width)
    rules = norm_rules(model, "layers.{layer}.attention_norm", LAYER + ".input_layernorm")
    rules.append(whole(f"{ours}.qkv", qkv, f"{theirs}.linear_qkv.weight", (groups * (queries + 2) * width, hidden)))
    rules.append(whole(f"{ours}.output", heads, f"{theirs}.linear_proj.weight", (hidden, groups * queries * width)))
    if model.qk_layernorm == "head":
        rules += [whole(f"{ours}.{x}_norm.weight", (width,), f"{theirs}.{x}_layernorm.weight") for x in "qk"]
    return rules + norm_rules(model, "layers.{layer}.mlp_norm", LAYER + ".pre_mlp_layernorm")


def feed_forward(ours: str, theirs: str, hidden: int, inner: int, branches: int) -> list[Rule]:
    """The two products of a dense layer, of an expert, of a shared expert."""
    return [
        whole(f"{ours}.w1", (branches, inner, hidden), f"{theirs}.linear_fc1.weight", (branches * inner, hidden)),
        whole(f"{ours}.w2", (hidden, inner), f"{theirs}.linear_fc2.weight"),
    ]


def dense_rules(model: ModelConfig) -> list[Rule]:
    """The feed-forward of a dense layer."""
    branches = BRANCHES[model.activation]
    return feed_forward("layers.{layer}.mlp", f"{LAYER}.mlp", model.hidden_size, model.ffn_size, branches)


def expert_rules(shape: ModelShape) -> list[Rule]:
    """Router, experts and shared expert of a sparse layer."""
    hidden, moe, ours, theirs = shape.model.hidden_size, shape.moe, "layers.{layer}.mlp", f"{LAYER}.mlp"
    branches = BRANCHES[shape.model.activation]
    rules = [whole(f"{ours}.router.weight", (moe.num_experts, hidden), f"{theirs}.router.weight")]
    if moe.router_type == "deepseek_v3":
        rules.append(whole(f"{ours}.router.expert_bias", (moe.num_experts,), f"{theirs}.router.expert_bias"))
    expert = "experts.{expert}"
    rules += feed_forward(f"{ours}.{expert}", f"{theirs}.{expert}", hidden, shape.expert_size, branches)
    if moe.shared_expert_intermediate_size:
        size = moe.shared_expert_intermediate_size
        rules += feed_forward(f"{ours}.shared_expert", f"{theirs}.shared_experts", hidden, size, branches)
    if moe.shared_expert_gate:
        rules.append(whole(f"{ours}.shared_expert.gate", (1, hidden), f"{theirs}.shared_experts.gate_weight"))
    return rules
