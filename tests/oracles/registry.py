"""Which oracle belongs to which router, and which cases it is asked."""

from collections.abc import Callable, Mapping
from typing import Any

from oracles import token_choice
from oracles.case import Case, Expected

Oracle = Callable[[Case], Expected]

ORACLES: dict[str, Oracle] = {
    "top_k": token_choice.top_k,
    "switch": token_choice.switch,
    "gshard": token_choice.gshard,
    "st_moe": token_choice.st_moe,
    "expert_choice": token_choice.expert_choice,
}

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
}
