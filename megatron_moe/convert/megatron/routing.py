"""Megatron's router settings as ours: softmax with the k largest, or sigmoid scores with a bias (DeepSeek-V3)."""

from __future__ import annotations

import logging
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.convert.megatron.saved import Saved

log = logging.getLogger(__name__)


def router_fields(saved: Saved) -> dict[str, Any]:
    """Fields of MoEConfig; ConfigError names a router that the project computes otherwise."""
    saved.must_be("moe_router_score_function", ("softmax", "sigmoid"), "the project's routers have no such scores")
    saved.must_be("moe_router_force_load_balancing", (False,), "it routes at random")
    if saved.get("moe_router_load_balancing_type") == "sinkhorn":
        raise ConfigError("args.moe_router_load_balancing_type is 'sinkhorn', which the project computes otherwise.")
    sigmoid = saved.text("moe_router_score_function", default="softmax") == "sigmoid"
    return _sigmoid(saved) if sigmoid else _softmax(saved)


def _softmax(saved: Saved) -> dict[str, Any]:
    saved.must_be("moe_router_num_groups", (None,), "softmax scores with groups are another router than ours")
    saved.must_be("moe_router_enable_expert_bias", (False,), "a bias goes with sigmoid scores")
    factor = saved.number("moe_router_topk_scaling_factor", default=1.0)
    return {
        "router_type": "top_k",
        "router_topk": saved.integer("moe_router_topk", default=2),
        "router_pre_softmax": saved.truth("moe_router_pre_softmax"),
        "aux_loss_coeff": _balance(saved, "aux_loss"),
        "router_options": {} if factor == 1.0 else {"topk_scaling_factor": repr(factor)},
    }


def _sigmoid(saved: Saved) -> dict[str, Any]:
    if not saved.truth("moe_router_enable_expert_bias"):
        raise ConfigError(
            "args.moe_router_score_function 'sigmoid' without moe_router_enable_expert_bias: the project's sigmoid "
            "router always has a bias, which the checkpoint does not hold."
        )
    options = {
        "route_scale": repr(saved.number("moe_router_topk_scaling_factor", default=1.0)),
        "bias_update_rate": repr(saved.number("moe_router_bias_update_rate", default=1e-3)),
    }
    if "moe_router_num_groups" in saved and "moe_router_group_topk" in saved:
        options["num_groups"] = str(saved.integer("moe_router_num_groups"))
        options["topk_groups"] = str(saved.integer("moe_router_group_topk"))
        # the best k / topk_groups of a group speak for it
        options["group_score_experts"] = "none"
    coefficient = _balance(saved, "seq_aux_loss")
    if coefficient:
        options["sequence_loss_coeff"] = repr(coefficient)
    return {
        "router_type": "deepseek_v3",
        "router_topk": saved.integer("moe_router_topk", default=2),
        "router_options": options,
    }


def _balance(saved: Saved, kind: str) -> float:
    """The weight of the balance loss where it is of that kind; another kind is told: it only matters in training."""
    told, value = saved.get("moe_router_load_balancing_type"), saved.get("moe_aux_loss_coeff")
    if told in (None, "none") or not value:
        return saved.number("moe_aux_loss_coeff", default=0.0) if told is None and kind == "aux_loss" else 0.0
    if told == kind:
        return saved.number("moe_aux_loss_coeff")
    log.warning("args.moe_router_load_balancing_type %r with coefficient %r is not carried over", told, value)
    return 0.0
