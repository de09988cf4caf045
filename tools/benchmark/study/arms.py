"""What is compared: each way of routing at the same active FLOPs, and the tables of three papers' claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.benchmark.study.run import Arm, Size

SIZES = {
    "smoke": Size("smoke", 2, 32, 2, 64, 64, 8, 12, 4e-3, trials=2),
    "tiny": Size("tiny", 3, 64, 4, 64, 128, 16, 300, 6e-3, trials=12),
    "small": Size("small", 8, 256, 8, 1024, 512, 64, 4000, 1e-3, trials=32),
}
EXPERTS = 8
MEMORY_EXPERTS = 16  # times the width of one: a square, as product keys want
BALANCE: dict[str, Any] = {"aux_loss_coeff": 0.01}
Fields = Mapping[str, Any]


def sparse(router: str, width: int, *, experts: int = EXPERTS, **more: Any) -> dict[str, Any]:
    """Every layer sparse."""
    fixed = {"num_experts": experts, "layer_freq": "1", "ffn_hidden_size": width, "router_type": router}
    return {**fixed, **more}


def main_arms(size: Size) -> list[Arm]:
    """Each method beside the dense model: what a token uses of a sparse layer is as wide as a dense one."""
    full, half = size.ffn, size.ffn // 2
    leaks = {"allow_noncausal": True}
    causal = {
        "switch": sparse("switch", full, **BALANCE),
        "gshard": sparse("gshard", half, **BALANCE),
        "top_k": sparse("top_k", half, **BALANCE),
        "st_moe": sparse("st_moe", half, z_loss_coeff=0.001, **BALANCE),
        "noisy_top_k": sparse("noisy_top_k", half),
        "m6_t": sparse("m6_t", half, router_topk=2, **BALANCE),
        "sam": sparse("sam", half, router_topk=2, router_options={"groups": "4"}, **BALANCE),
        "sam, alignment loss": sparse(
            "sam", half, router_topk=2, router_options={"groups": "4", "align_coeff": "0.01"}, **BALANCE
        ),
        "sam hierarchical": sparse(
            "sam", half, router_topk=2, router_options={"groups": "4", "mode": "hierarchical"}, **BALANCE
        ),
        "deepseek": sparse("deepseek", half, router_topk=2, **BALANCE),
        "deepseek_v3": sparse("deepseek_v3", half, router_topk=2),
        "remoe": sparse("remoe", full, router_topk=1),
        "expert_choice_position": sparse("expert_choice_position", half, routing_group_samples=8),
        "expert_choice_threshold": sparse("expert_choice_threshold", half),
        "hash": sparse("hash", full, router_topk=1),
        "thor": sparse("thor", full),
        "thor, two passes": sparse("thor", full, consistency_coeff=5.0),
    }
    leaking = {
        "expert_choice": sparse("expert_choice", half, **leaks),
        "ec_cap": sparse("ec_cap", half, **leaks),
        "base": sparse("base", full, **leaks),
        "sinkhorn": sparse("sinkhorn", full, router_topk=1, **leaks),
        "soft_moe": sparse("soft_moe", full, router_options={"slots": str(size.length // EXPERTS)}, **leaks),
        "smear": sparse("smear", full, **leaks),
        "mixture_of_depths": sparse(
            "mixture_of_depths", full, experts=1, router_topk=1, ffn_hidden_size=None, layer_freq="2", **leaks
        ),
    }
    arms = [Arm("dense", "main")]
    for table, methods in (("main", causal), ("leaking", leaking)):
        arms += [Arm(name, table, moe) for name, moe in methods.items()]
        arms += [Arm(f"{name}, frozen router", table, moe, True) for name, moe in methods.items() if learns(name)]
    return arms


def learns(name: str) -> bool:
    """Whether a router has parameters of its own that training moves."""
    return not name.startswith(("hash", "thor"))


def sam_arms(size: Size) -> list[Arm]:
    """Experts activated by sparsity, experts of one width: SAM's claim. Groups hold eight experts."""
    width = size.ffn // 4
    arms = []
    for experts in (8, 16, 32, 64):
        for choices in (1, 2, 4, 8):
            options = {"groups": str(experts // 8)}
            moe = sparse("sam", width, experts=experts, router_topk=choices, router_options=options, **BALANCE)
            arms.append(Arm(f"E={experts} k={choices}", "sam", moe))
    return arms


def memory_arms(size: Size) -> list[Arm]:
    """Block size by way of choosing, with the same number of active cells of the same memory: Avg-K's claim."""
    cells = MEMORY_EXPERTS * size.ffn
    arms = []
    for block in (size.ffn, size.ffn // 4, size.ffn // 16):
        shape: dict[str, Any] = {"experts": cells // block, "router_topk": size.ffn // block, "activation": "gelu"}
        gate: dict[str, Any] = {"router_pre_softmax": True, **BALANCE}
        arms += [
            Arm(f"g={block} avg_k", "memory", sparse("avg_k", block, **shape)),
            Arm(f"g={block} learned gate", "memory", sparse("top_k", block, **shape, **gate)),
            Arm(f"g={block} rand_hash", "memory", sparse("rand_hash", block, **shape)),
        ]
    whole: dict[str, Any] = {"experts": MEMORY_EXPERTS, "router_topk": 1}
    cell: dict[str, Any] = {**whole, "activation": "gelu"}
    single: dict[str, Fields] = {
        "g=1 vanilla_memory": sparse("vanilla_memory", size.ffn, **cell),
        "g=1 low_rank_keys": sparse("low_rank_keys", size.ffn, **cell),
        "g=1 controller": sparse("controller", size.ffn, **cell),
        "g=1 product_keys": sparse("product_keys", size.ffn, **whole),
        "g=1 product_keys_ffn": sparse("product_keys_ffn", size.ffn, **cell),
    }
    return arms + [Arm(name, "memory", moe) for name, moe in single.items()]


TABLES = {"main": main_arms, "sam": sam_arms, "memory": memory_arms}


def arms_of(tables: Sequence[str], size: Size) -> list[Arm]:
    """All arms of these tables, in order."""
    return [arm for table in tables for arm in TABLES[table](size)]
