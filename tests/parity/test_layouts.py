"""Layout changes nothing but the time: each router, on each layout, equals one process in float64."""

from typing import Any

import pytest
from parity.tiny_runs import TOLERANCE, Outcome, alone, outcome_of, run_all, tiny_config, worst_difference
from ranks import run_on_ranks

Tables = dict[str, Any]

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"

# layout -> (ranks, options, samples in a microbatch)
LAYOUTS: dict[str, tuple[int, Tables, int]] = {
    "micro-batches of 2": (1, {}, 2),
    "micro-batches of 4": (1, {}, 4),
    "recomputation": (1, {"recompute_granularity": "full"}, 1),
    "TP 2 with sequence parallelism": (2, {TP: 2}, 1),
    "TP 2": (2, {TP: 2, "sequence_parallel": False}, 2),
    "CP 2": (2, {CP: 2}, 1),
    "PP 2": (2, {PP: 2}, 1),
    "PP 2 sequential": (2, {PP: 2, "pipeline_schedule": "sequential"}, 2),
    "PP 2 split backward": (2, {PP: 2, "pipeline_schedule": "1f1b_split"}, 1),
    "EP 2": (2, {EP: 2}, 1),
    "ETP 2": (2, {ETP: 2}, 1),
    "DP 2 with ZeRO-1": (2, {}, 1),
    "DP 2 without ZeRO-1": (2, {"use_distributed_optimizer": False}, 2),
    "EP 2 folded over TP 2": (2, {TP: 2, EP: 2, ETP: 1}, 1),
    "EP 4": (4, {EP: 4}, 1),
    "TP 2 x CP 2": (4, {TP: 2, CP: 2}, 2),
    "EP 2 x ETP 2": (4, {EP: 2, ETP: 2}, 1),
    "TP 2 x PP 2 x EP 2": (8, {TP: 2, PP: 2, EP: 2, ETP: 1}, 1),
    "TP 2 x PP 2 x EP 2 x ETP 2": (8, {TP: 2, PP: 2, EP: 2, ETP: 2}, 2),
    "TP 2 x PP 2 x EP 2, recomputation, split backward": (
        8,
        {TP: 2, PP: 2, EP: 2, ETP: 1, "recompute_granularity": "full", "pipeline_schedule": "1f1b_split"},
        1,
    ),
}

# what is trained: router, its options, and a model that differs in everything else, so that all parts are met
LOSSES = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}
MODELS: dict[str, tuple[Tables, Tables]] = {
    "top_k": ({"router_type": "top_k", **LOSSES}, {}),
    "top_k with capacity by weight, shared expert": (
        {
            "router_type": "top_k",
            "expert_capacity_factor": 0.7,
            "token_drop_policy": "probs",
            "shared_expert_intermediate_size": 8,
            "shared_expert_gate": True,
            **LOSSES,
        },
        {"kv_channels": 6, "activation": "gelu"},
    ),
    "switch with capacity": (
        {"router_type": "switch", "expert_capacity_factor": 1.0, **LOSSES},
        {"normalization": "LayerNorm", "untie_embeddings_and_output_weights": True},
    ),
    "switch": ({"router_type": "switch", **LOSSES}, {"rotary_percent": 0.5}),
    "gshard": ({"router_type": "gshard", **LOSSES}, {"position_embedding_type": "none"}),
    "gshard with capacity, first choices first": (
        {"router_type": "gshard", "expert_capacity_factor": 1.0, "slot_priority": "k_major", **LOSSES},
        {"qk_layernorm": "head"},
    ),
    "st_moe": ({"router_type": "st_moe", **LOSSES}, {"activation": "geglu"}),
    "st_moe with capacity": (
        {"router_type": "st_moe", "expert_capacity_factor": 1.0, "capacity_includes_k": False, **LOSSES},
        {"qk_layernorm": "projection", "num_query_groups": 4},
    ),
    "expert_choice": (
        {"router_type": "expert_choice", "allow_noncausal": True, "z_loss_coeff": 0.001},
        {"untie_embeddings_and_output_weights": True},
    ),
    "expert_choice over two samples": (
        {"router_type": "expert_choice", "allow_noncausal": True, "routing_group_samples": 2},
        {},
    ),
    "st_moe with a bias, dropout and a dense layer behind": (
        {
            "router_type": "st_moe",
            "activation": "geglu",
            "expert_bias": "multiplicative",
            "expert_dropout": 0.3,
            "extra_ffn": "after",
            "aux_layer_reduction": "mean",
            **LOSSES,
        },
        {"activation": "relu"},
    ),
    "switch with a bias and a dense layer before, two passes": (
        {
            "router_type": "switch",
            "expert_bias": "additive",
            "expert_capacity_factor": 0.7,
            "token_drop_policy": "bpr",
            "extra_ffn": "before",
            "consistency_coeff": 5.0,
            **LOSSES,
        },
        {},
    ),
    "dense": ({"num_experts": 0}, {}),
}
DISPATCHERS = ("alltoall", "allgather", "one_per_rank")


def _fits(model: str, layout: str) -> bool:
    """A routing group of two samples needs microbatches of two; a dense model has no experts to split."""
    _, options, micro_batch = LAYOUTS[layout]
    group = MODELS[model][0].get("routing_group_samples", 1)
    return micro_batch % group == 0 and not (model == "dense" and (EP in options or ETP in options))


def _config(model: str, options: Tables, micro_batch: int, dispatcher: str = "auto") -> Any:
    moe, sizes = MODELS[model]
    if dispatcher != "auto":
        moe = {**moe, "token_dispatcher_type": dispatcher}
    return tiny_config(moe, options, sizes, micro_batch)


@pytest.fixture(scope="module")
def wanted() -> dict[str, Outcome]:
    """Each model on one process, by microbatches of its routing group."""
    return {name: alone(_config(name, {}, moe.get("routing_group_samples", 1))) for name, (moe, _) in MODELS.items()}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_layout_equals_one_process(world_size: int, wanted: dict[str, Outcome]) -> None:
    cases = [
        (model, layout)
        for layout, (ranks, _, _) in LAYOUTS.items()
        for model in MODELS
        if ranks == world_size and _fits(model, layout)
    ]
    configs = [_config(model, LAYOUTS[layout][1], LAYOUTS[layout][2]) for model, layout in cases]
    answers = run_on_ranks(world_size, run_all, configs)
    for number, (model, layout) in enumerate(cases):
        found = outcome_of([rank[number] for rank in answers])
        differences = worst_difference(found, wanted[model])
        assert max(differences.values()) < TOLERANCE, f"{model} on {layout}: {differences}"


def test_every_dispatcher_equals_one_process(wanted: dict[str, Outcome]) -> None:
    layouts = {"EP 4": {EP: 4}, "EP 2 x ETP 2": {EP: 2, ETP: 2}}
    models = ("top_k", "st_moe with capacity", "expert_choice")
    cases = [(model, layout, kind) for model in models for layout in layouts for kind in DISPATCHERS]
    configs = [_config(model, layouts[layout], 1, kind) for model, layout, kind in cases]
    answers = run_on_ranks(4, run_all, configs)
    for number, (model, layout, kind) in enumerate(cases):
        differences = worst_difference(outcome_of([rank[number] for rank in answers]), wanted[model])
        assert max(differences.values()) < TOLERANCE, f"{model} on {layout} by {kind}: {differences}"
