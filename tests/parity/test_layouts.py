"""Layout changes nothing but the time: each router, on each layout, equals one process in float64."""

from typing import Any

import pytest
from ranks import run_on_ranks

from megatron_moe.certify.layouts import EP, ETP, LAYOUTS, NODE
from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.certify.tiny_run import TOLERANCE, Outcome, alone, outcome_of, run_all, worst_difference

# all models of a world size in one process start: minutes, not seconds
pytestmark = pytest.mark.timeout(1200)

Tables = dict[str, Any]

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
    "sam, hierarchical with places for groups": (
        {
            "router_type": "sam",
            "num_experts": 8,
            "expert_capacity_factor": 0.8,
            "token_drop_policy": "probs",
            "router_options": {"groups": "2", "mode": "hierarchical"},
            **LOSSES,
        },
        {},
    ),
    "sam with an alignment loss": (
        {
            "router_type": "sam",
            "num_experts": 8,
            "router_options": {"groups": "4", "align_coeff": "0.1"},
            "shared_expert_intermediate_size": 8,
            **LOSSES,
        },
        {"activation": "gelu"},
    ),
    "deepseek_v3 with groups": (
        {
            "router_type": "deepseek_v3",
            "num_experts": 8,
            "router_topk": 3,
            "routing_group_samples": 2,
            "router_options": {
                "num_groups": "4",
                "topk_groups": "2",
                "bias_update_rate": "0.05",
                "sequence_loss_coeff": "0.1",
            },
        },
        {},
    ),
    "deepseek with devices": (
        {
            "router_type": "deepseek",
            "num_experts": 8,
            "router_topk": 3,
            "expert_capacity_factor": 1.0,
            "router_options": {
                "num_groups": "4",
                "topk_groups": "2",
                "device_loss_coeff": "0.05",
                "communication_loss_coeff": "0.02",
            },
            **LOSSES,
        },
        {},
    ),
    "avg_k, live keys": (
        {
            "router_type": "avg_k",
            "num_experts": 8,
            "router_topk": 3,
            "ffn_hidden_size": 4,
            "router_options": {"gate_weight": "softmax", "key_source": "live"},
            **LOSSES,
        },
        {},
    ),
    "thor, two passes": ({"router_type": "thor", "consistency_coeff": 5.0}, {}),
    "remoe": ({"router_type": "remoe", "router_topk": 1, "router_options": {"first_coeff": "0.05"}}, {}),
    "encoder-decoder": (
        {"router_type": "st_moe", "expert_capacity_factor": 1.0, "extra_ffn": "after", "aux_loss_coeff": 0.01},
        {
            "encoder_num_layers": 2,
            "position_embedding_type": "relative",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 10,
        },
    ),
    "dense": ({"num_experts": 0}, {}),
}
DISPATCHERS = ("alltoall", "allgather", "one_per_rank", "hierarchical")


def _fits(model: str, layout: str) -> bool:
    """A routing group of two samples needs microbatches of two; a dense model has no experts."""
    known = LAYOUTS[layout]
    group = MODELS[model][0].get("routing_group_samples", 1)
    of_experts = {EP, ETP} & set(known.parallel) or {"moe", "moe_act"} & set(
        known.parallel.get("recompute_modules", ())
    )
    return known.micro_batch_size % group == 0 and not (model == "dense" and of_experts)


# other ways of doing what a plain layout does: each meets every third model, for all layouts meet other ones
OTHER_WAYS = {
    "cp_comm_type",
    "tp_comm_overlap",
    "data_parallel_sharding_strategy",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    NODE,
}


def _is_run(model: str, layout: str) -> bool:
    if not _fits(model, layout):
        return False
    known = LAYOUTS[layout]
    overlapped = known.parallel.get("pipeline_schedule") == "1f1b_overlap"
    other = OTHER_WAYS & set(known.parallel) or known.uneven or overlapped
    return not other or (list(MODELS).index(model) + list(LAYOUTS).index(layout)) % 3 == 0


def _fields(model: str, layout: str) -> Tables:
    return LAYOUTS[layout].fields_for(MODELS[model][1].get("encoder_num_layers", 0), 4)


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
        for layout, known in LAYOUTS.items()
        for model in MODELS
        if known.ranks == world_size and _is_run(model, layout)
    ]
    configs = [_config(model, _fields(model, layout), LAYOUTS[layout].micro_batch_size) for model, layout in cases]
    answers = run_on_ranks(world_size, run_all, configs)
    for number, (model, layout) in enumerate(cases):
        found = outcome_of([rank[number] for rank in answers])
        differences = worst_difference(found, wanted[model])
        assert max(differences.values()) < TOLERANCE, f"{model} on {layout}: {differences}"


def test_every_dispatcher_equals_one_process(wanted: dict[str, Outcome]) -> None:
    layouts: dict[str, Tables] = {"EP 4": {EP: 4}, "EP 2 x ETP 2": {EP: 2, ETP: 2}}
    models = ("top_k", "st_moe with capacity", "expert_choice")
    cases = [(model, layout, kind) for model in models for layout in layouts for kind in DISPATCHERS]
    nodes = {"hierarchical": {NODE: 1}}  # the other halves of ep are among the layouts
    configs = [_config(model, {**layouts[layout], **nodes.get(kind, {})}, 1, kind) for model, layout, kind in cases]
    answers = run_on_ranks(4, run_all, configs)
    for number, (model, layout, kind) in enumerate(cases):
        differences = worst_difference(outcome_of([rank[number] for rank in answers]), wanted[model])
        assert max(differences.values()) < TOLERANCE, f"{model} on {layout} by {kind}: {differences}"
