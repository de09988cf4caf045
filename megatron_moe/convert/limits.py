"""Why a project model cannot be written as one of the Llama-like sparse families, sentence by sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.config.moe import MoEConfig
from megatron_moe.convert.family import ModelShape

# The routers that end in a softmax and the k largest, and those of their options that evaluation does not see, or that
# `routing` reads.
NO_TRACE = {
    "top_k": ("renormalise", "balance"),
    "switch": ("jitter_eps",),
    "gshard": ("second_policy", "renormalise"),
    "st_moe": ("train_policy", "train_threshold", "eval_policy", "eval_threshold"),
}


def common_obstacles(shape: ModelShape, *, qk_layernorm: str) -> list[str]:
    """What none of the three families can express; `qk_layernorm` is the kind that this one always has."""
    model, moe = shape.model, shape.moe
    kinds = {"none": "no query-key norm", "head": "a query-key norm in each head", "projection": "one over all heads"}
    found = []
    if model.encoder_num_layers:
        found.append(
            f"--encoder-num-layers {model.encoder_num_layers}: the family is a decoder alone; there is no way out"
        )
    if not shape.sparse_layers:
        found.append("it has no MoE layer (--num-experts 0 or --moe-layer-freq); export is for sparse models")
    if model.position_embedding_type != "rope":
        found.append(f"--position-embedding-type {model.position_embedding_type}: the family has rope; train with it")
    if model.rotary_percent != 1.0:
        found.append(f"--rotary-percent {model.rotary_percent:g}: the family rotates whole heads; train with 1.0")
    if model.normalization != "RMSNorm":
        found.append(f"--normalization {model.normalization}: the family has RMSNorm; train with that")
    if model.activation != "swiglu":
        found.append(f"--activation {model.activation}: the family's experts are SwiGLU; train with --swiglu")
    if moe.activation not in (None, "swiglu"):
        found.append(f"--moe-activation {moe.activation}: the family's experts are SwiGLU; leave it out in training")
    if moe.expert_bias != "none":
        found.append(f"--moe-expert-bias {moe.expert_bias}: the family's experts have none; train without it")
    if moe.extra_ffn != "none":
        found.append(f"--moe-extra-ffn {moe.extra_ffn}: the family has no layer beside the sparse ones; train without")
    if moe.shared_expert_intermediate_size:
        found.append(
            f"--moe-shared-expert-intermediate-size {moe.shared_expert_intermediate_size}: the family has no shared "
            f"expert; train without one"
        )
    if model.qk_layernorm != qk_layernorm:
        found.append(
            f"--qk-layernorm {model.qk_layernorm}: the family has {kinds[qk_layernorm]}, always; "
            f"use the family that fits (mixtral: none, olmoe: projection, qwen3_moe: head)"
        )
    return found + router_obstacles(moe)


@dataclass(frozen=True)
class Routing:
    """How a trained router decides, in the library's words: num_experts_per_tok and norm_topk_prob."""

    choices: int
    renormalised: bool


def routing(moe: MoEConfig) -> Routing:
    """What the router does in evaluation, for the types and options that `router_obstacles` lets through."""
    options = moe.router_options
    match moe.router_type:
        case "switch":
            return Routing(1, False)
        case "gshard":
            return Routing(2, options.get("renormalise", "before_drop") != "none")
        case "st_moe":
            return Routing(moe.router_topk, True)
    told = options.get("renormalise", "none").strip().lower()
    # top_k's renormalise left at none: the weights sum to one when the softmax follows the choice
    return Routing(moe.router_topk, told == "true" or (told == "none" and not moe.router_pre_softmax))


def router_obstacles(moe: MoEConfig) -> list[str]:
    """Routers that are no softmax with the k largest, and options that change what a trained one takes or weighs."""
    if moe.router_type not in NO_TRACE:
        return [
            f"--moe-router-type {moe.router_type}: the library's router takes the k largest of a softmax; "
            f"train with {', '.join(NO_TRACE)}"
        ]
    if moe.router_type == "st_moe" and moe.router_options.get("eval_policy") != "all":
        return [
            "--moe-router-type st_moe passes over experts 2 to n that weigh little, but the library always uses all n; "
            "train with --moe-router-options eval_policy=all"
        ]
    return [
        f"--moe-router-options {name}={value}: the library's router has nothing like it; train without"
        for name, value in moe.router_options.items()
        if name not in NO_TRACE[moe.router_type] and not _neutral(name, value)
    ]


def _neutral(name: str, value: str) -> bool:
    return name == "topk_scaling_factor" and re.fullmatch(r"\s*1(\.0*)?\s*", value) is not None


def dense_layer_obstacle(dense_layers: Sequence[int], *, family: str) -> list[str]:
    """For families in which every layer is sparse."""
    if not dense_layers:
        return []
    told = ", ".join(map(str, dense_layers[:4])) + (", ..." if len(dense_layers) > 4 else "")
    return [
        f"layers {told} are dense, but every {family} layer is sparse; use --model-type qwen3_moe (it needs "
        f"--qk-layernorm head), or train with --moe-layer-freq 1"
    ]
