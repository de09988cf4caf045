"""Which oracle belongs to which router, and which cases it is asked."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from oracles import (
    balanced,
    capped_choice,
    causal_expert_choice,
    deepseek,
    depth,
    memory_blocks,
    noisy,
    sam,
    token_choice,
    unlearned,
)
from oracles.case import Case, Expected

Oracle = Callable[[Case], Expected]

ORACLES: dict[str, Oracle] = {
    "top_k": token_choice.top_k,
    "noisy_top_k": noisy.noisy_top_k,
    "m6_t": noisy.m6_t,
    "remoe": noisy.remoe,
    "sam": sam.sam,
    "deepseek": deepseek.deepseek,
    "deepseek_v3": deepseek.deepseek_v3,
    "switch": token_choice.switch,
    "gshard": token_choice.gshard,
    "st_moe": token_choice.st_moe,
    "expert_choice": token_choice.expert_choice,
    "expert_choice_position": causal_expert_choice.expert_choice_position,
    "expert_choice_threshold": causal_expert_choice.expert_choice_threshold,
    "ec_cap": capped_choice.ec_cap,
    "base": balanced.base,
    "sinkhorn": balanced.sinkhorn,
    "hash": unlearned.hash_layer,
    "rand_hash": unlearned.rand_hash,
    "avg_k": memory_blocks.avg_k,
    "thor": unlearned.thor,
    "mixture_of_depths": depth.mixture_of_depths,
}

TOKEN_COUNTS = str(Path(__file__).parents[1] / "golden" / "token_counts.json")  # of moe_rows.VOCAB ids

LOSSES: Mapping[str, Any] = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}
# name of the case -> fields of [moe]; every one is asked in training and in evaluation
CASES: dict[str, dict[str, Any]] = {
    "top_k": {"router_type": "top_k", **LOSSES},
    "top_k-raw": {
        "router_type": "top_k",
        "router_pre_softmax": True,
        "router_topk": 3,
        "router_options": {"balance": "all_choices", "topk_scaling_factor": "2.5"},
        **LOSSES,
    },
    "top_k-first_choice": {"router_type": "top_k", "router_options": {"balance": "first_choice"}, **LOSSES},
    "noisy_top_k": {"router_type": "noisy_top_k", **LOSSES},
    "noisy_top_k-fixed": {
        "router_type": "noisy_top_k",
        "router_pre_softmax": True,
        "router_topk": 1,
        "router_options": {"noise": "fixed", "noise_std": "2", "load_coeff": "0.2"},
        "routing_group_samples": 2,
    },
    "m6_t": {"router_type": "m6_t", **LOSSES},
    "remoe": {"router_type": "remoe", "router_topk": 1, "router_options": {"first_coeff": "0.05"}},
    "sam": {"router_type": "sam", "router_options": {"groups": "2", "align_coeff": "0.1"}, **LOSSES},
    "sam-bias": {
        "router_type": "sam",
        "router_options": {
            "groups": "2",
            "bias": "true",
            "renormalise": "true",
            "align_coeff": "0.1",
            "align_reduction": "sum",
        },
        **LOSSES,
    },
    "sam-hierarchical": {
        "router_type": "sam",
        "router_topk": 1,
        "router_options": {"groups": "2", "mode": "hierarchical", "expert_balance_coeff": "0.3"},
        "routing_group_samples": 2,
        **LOSSES,
    },
    "deepseek": {"router_type": "deepseek", "router_options": {"route_scale": "16"}, **LOSSES},
    "deepseek-devices": {
        "router_type": "deepseek",
        "router_topk": 3,
        "router_options": {
            "num_groups": "4",
            "topk_groups": "3",
            "device_loss_coeff": "0.05",
            "communication_loss_coeff": "0.02",
        },
        **LOSSES,
    },
    "deepseek_v3": {"router_type": "deepseek_v3", "z_loss_coeff": 0.001},
    "deepseek_v3-groups": {
        "router_type": "deepseek_v3",
        "router_topk": 2,
        "router_options": {
            "num_groups": "2",
            "topk_groups": "1",
            "sequence_loss_coeff": "0.1",
            "group_score_experts": "1",
        },
        "routing_group_samples": 2,
    },
    "deepseek_v3-softmax": {
        "router_type": "deepseek_v3",
        "router_options": {
            "score": "softmax",
            "num_groups": "4",
            "topk_groups": "2",
            "group_score_experts": "none",
            "route_scale": "1",
        },
    },
    "switch": {"router_type": "switch", **LOSSES},
    "switch-still": {"router_type": "switch", "router_options": {"jitter_eps": "0"}, **LOSSES},
    "gshard": {"router_type": "gshard", **LOSSES},
    "gshard-sampling": {
        "router_type": "gshard",
        "router_options": {"second_policy": "sampling", "renormalise": "none"},
        **LOSSES,
    },
    "st_moe": {"router_type": "st_moe", **LOSSES},
    "st_moe-three": {
        "router_type": "st_moe",
        "router_topk": 3,
        "router_options": {"train_policy": "threshold", "train_threshold": "0.3", "eval_policy": "all"},
        **LOSSES,
    },
    "expert_choice": {"router_type": "expert_choice", "z_loss_coeff": 0.001},
    "expert_choice-round": {
        "router_type": "expert_choice",
        "router_options": {"capacity": "1.3", "rounding": "round"},
        "routing_group_samples": 2,
    },
    "expert_choice_position": {
        "router_type": "expert_choice_position",
        "routing_group_samples": 2,
        "z_loss_coeff": 0.001,
    },
    "expert_choice_position-three": {
        "router_type": "expert_choice_position",
        "routing_group_samples": 3,
        "router_options": {"capacity": "2.5", "rounding": "floor"},
    },
    "expert_choice_threshold": {"router_type": "expert_choice_threshold", "z_loss_coeff": 0.001},
    # with the paper's lambda, 100 iterations end too early in groups this small: two tokens may stand level, and the
    # last bit decides between them
    "ec_cap": {
        "router_type": "ec_cap",
        "router_options": {"entropy": "0.02", "iterations": "300"},
        "z_loss_coeff": 0.001,
    },
    "ec_cap-smooth": {
        "router_type": "ec_cap",
        "routing_group_samples": 2,
        "router_options": {"capacity": "1.6", "cap": "2", "entropy": "0.05", "rounding": "round", "iterations": "500"},
    },
    "ec_cap-strict": {
        "router_type": "ec_cap",
        "routing_group_samples": 3,
        "router_options": {"strict_cap": "true", "entropy": "0.05"},
    },
    "base": {"router_type": "base", "z_loss_coeff": 0.001},
    "base-pair": {"router_type": "base", "routing_group_samples": 2},
    "sinkhorn": {"router_type": "sinkhorn", "z_loss_coeff": 0.001},
    "sinkhorn-one": {
        "router_type": "sinkhorn",
        "router_topk": 1,
        "routing_group_samples": 2,
        "router_options": {"temperature": "0.5", "tolerance": "0", "iterations": "30"},
    },
    "hash": {"router_type": "hash"},
    "hash-balanced": {
        "router_type": "hash",
        "router_options": {"table": "balanced", "token_counts": TOKEN_COUNTS},
    },
    "hash-mod": {"router_type": "hash", "router_topk": 1, "router_options": {"table": "mod"}},
    "hash-previous": {"router_type": "hash", "router_topk": 1, "router_options": {"table": "previous"}},
    "rand_hash": {"router_type": "rand_hash", "router_topk": 3},
    "avg_k": {"router_type": "avg_k", "router_topk": 3, **LOSSES},
    "avg_k-softmax": {"router_type": "avg_k", "router_options": {"gate_weight": "softmax"}},
    "avg_k-sigmoid": {
        "router_type": "avg_k",
        "router_topk": 1,
        "router_options": {"gate_weight": "sigmoid", "key_source": "live"},
    },
    "mixture_of_depths": {
        "router_type": "mixture_of_depths",
        "num_experts": 1,
        "router_topk": 1,
        "router_options": {"capacity": "0.3", "inference": "top_k"},
    },
    "mixture_of_depths-predictor": {
        "router_type": "mixture_of_depths",
        "num_experts": 1,
        "router_topk": 1,
        "router_options": {"capacity": "0.5", "predictor_coeff": "0.05", "inference": "predictor"},
    },
    "thor": {"router_type": "thor"},
    "thor-group": {
        "router_type": "thor",
        "routing_group_samples": 2,
        "router_options": {"granularity": "group", "inference": "token"},
    },
    "thor-sequence": {
        "router_type": "thor",
        "router_options": {"granularity": "sequence", "inference": "ensemble"},
    },
    "thor-token": {
        "router_type": "thor",
        "router_options": {"granularity": "token", "inference": "fixed", "fixed_expert": "2"},
    },
}
