"""The settings that Megatron saved with a checkpoint (its `args`) as our model; what we have nothing for is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.convert.family import ModelShape
from megatron_moe.convert.megatron.routing import router_fields
from megatron_moe.convert.megatron.saved import Saved

# a setting that changes the model, the values under which it is ours, and what is in the way otherwise
MUST_BE: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("use_legacy_models", (False,), "the model is not Megatron-Core's"),
    ("multi_latent_attention", (False,), "the project has no multi-latent attention"),
    ("add_bias_linear", (False,), "the project's products have no biases (train with --disable-bias-linear)"),
    ("add_qkv_bias", (False,), "the project's attention has no biases"),
    ("position_embedding_type", ("rope", "none"), "the project has no such positions for a decoder"),
    ("rotary_interleaved", (False,), "the project turns the halves of a head, not neighbours"),
    ("use_rope_scaling", (False,), "the project does not scale positions"),
    ("rotary_seq_len_interpolation_factor", (None, 1), "the project does not scale positions"),
    ("no_rope_freq", (None,), "the project turns the heads of every layer"),
    ("apply_layernorm_1p", (False,), "its norms keep their weights less one"),
    ("apply_residual_connection_post_layernorm", (False,), "the project's residuals are taken before the norm"),
    ("normalization", ("LayerNorm", "RMSNorm"), "the project has no such norm"),
    ("squared_relu", (False,), "the project has no such activation"),
    ("quick_geglu", (False,), "the project has no such activation"),
    ("openai_gelu", (False,), "the project's GELU is the exact one"),
    ("glu_linear_offset", (None, 0), "the project's SwiGLU adds nothing"),
    ("activation_func_clamp_value", (None,), "the project's SwiGLU is not clamped"),
    ("qk_l2_norm", (False,), "the project has no such query-key norm"),
    ("attention_output_gate", (False,), "the project's attention has no gate"),
    ("softmax_type", (None, "vanilla"), "the project's softmax has no sink"),
    ("window_size", (None,), "the project's attention has no window"),
    ("linear_attention_freq", (None,), "the project has no linear attention"),
    ("experimental_attention_variant", (None,), "the project has no such attention"),
    ("heterogeneous_layers_config_path", (None,), "the layers of the project's models have one width"),
    ("hybrid_override_pattern", (None,), "the project has no Mamba layers"),
    ("hybrid_layer_pattern", (None,), "the project has no Mamba layers"),
    ("is_hybrid_model", (False,), "the project has no Mamba layers"),
    ("retro_add_retriever", (False,), "the project does not retrieve"),
    ("mtp_num_layers", (None, 0), "the project does not predict several tokens"),
    ("moe_latent_size", (None,), "the project's experts see whole tokens"),
    ("moe_apply_probs_on_input", (False,), "the project weighs answers, not tokens"),
)

log = logging.getLogger(__name__)


def read_settings(arguments: Mapping[str, Any], *, rows: int, vocab_size: int | None = None) -> ModelShape:
    """The model of saved `args`.

    rows: of the stored embedding.  vocab_size: ids that mean something, if somebody
    said; the saved vocab_size counts no end-of-document id, so that it cannot tell which rows are padding.

    Raises ConfigError that names the setting that the project cannot express.
    """
    saved = Saved(arguments)
    for name, allowed, why in MUST_BE:
        saved.must_be(name, allowed, why)
    vocabulary = vocab_size or rows
    if vocabulary > rows:
        raise ConfigError(f"--vocab-size {vocabulary} is more than the {rows} rows of the stored embedding.")
    moe = _moe_fields(saved)
    model = ModelConfig(**_model_fields(saved), vocab_size=vocabulary)
    _check_qk_norm(model)
    return ModelShape(model=model, moe=MoEConfig(**moe), vocab_size=vocabulary)


def _model_fields(saved: Saved) -> dict[str, Any]:
    heads, hidden = saved.integer("num_attention_heads"), saved.integer("hidden_size")
    grouped = saved.truth("group_query_attention")
    epsilon = "norm_epsilon" if "norm_epsilon" in saved else "layernorm_epsilon"
    length = saved.integer("max_position_embeddings", default=saved.integer("seq_length", default=0) or None)
    return {
        "num_layers": saved.integer("num_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": saved.integer("ffn_hidden_size"),
        "num_attention_heads": heads,
        # without grouping Megatron keeps a number of groups that it does not use
        "num_query_groups": saved.integer("num_query_groups") if grouped else heads,
        "kv_channels": saved.integer("kv_channels", default=hidden // heads),
        "max_position_embeddings": length,
        "position_embedding_type": saved.text("position_embedding_type", default="learned_absolute"),
        "rotary_base": saved.number("rotary_base", default=10000.0),
        "rotary_percent": saved.number("rotary_percent", default=1.0),
        "normalization": saved.text("normalization", default="LayerNorm"),
        "norm_epsilon": saved.number(epsilon, default=1e-5),
        "activation": "swiglu" if saved.truth("swiglu") else "gelu",
        "qk_layernorm": "head" if saved.truth("qk_layernorm") else "none",
        "untie_embeddings_and_output_weights": saved.truth("untie_embeddings_and_output_weights"),
        "make_vocab_size_divisible_by": saved.integer("make_vocab_size_divisible_by", default=128),
        "init_method_std": saved.number("init_method_std", default=0.02),
    }


def _check_qk_norm(model: ModelConfig) -> None:
    if model.qk_layernorm == "head" and model.normalization != "RMSNorm":
        raise ConfigError(
            f"args.qk_layernorm with normalization {model.normalization!r}: the project normalises queries and keys by "
            f"RMSNorm only."
        )


def _moe_fields(saved: Saved) -> dict[str, Any]:
    experts = saved.integer("num_experts", default=0) or 0
    if not experts:
        return {}
    for name in ("moe_expert_capacity_factor", "moe_input_jitter_eps"):
        if saved.get(name) is not None:
            log.warning("args.%s %s is not carried over; say it again where you train on", name, saved.get(name))
    fields = {
        "num_experts": experts,
        "ffn_hidden_size": saved.integer("moe_ffn_hidden_size", default=saved.integer("ffn_hidden_size")),
        "layer_freq": _layer_freq(saved),
        "z_loss_coeff": saved.number("moe_z_loss_coeff", default=0.0),
        **router_fields(saved),
    }
    shared = saved.integer("moe_shared_expert_intermediate_size", default=0)
    if shared:
        fields["shared_expert_intermediate_size"] = shared
        fields["shared_expert_gate"] = saved.truth("moe_shared_expert_gate")
    return fields


def _layer_freq(saved: Saved) -> str:
    """Which layers are sparse. Megatron's N means the first of every N layers, ours the last: so each is named."""
    layers, told = saved.integer("num_layers"), saved.get("moe_layer_freq")
    told = 1 if told is None else told
    if isinstance(told, int) and not isinstance(told, bool) and told >= 1:
        pattern = [int(index % told == 0) for index in range(layers)]
    elif isinstance(told, list) and len(told) == layers and set(told) <= {0, 1}:
        pattern = told
    else:
        raise ConfigError(
            f"args.moe_layer_freq is {told!r}, expected a number N or one 0 or 1 for each of {layers} layers."
        )
    if not any(pattern):
        raise ConfigError(f"args.moe_layer_freq {told!r} leaves no layer sparse, but there are experts.")
    return "1" if all(pattern) else ",".join(map(str, pattern))
