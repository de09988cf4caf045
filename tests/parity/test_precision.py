"""What is trained in bf16 or float32 follows the float64 run, on one process and on ranks."""

from typing import Any

import pytest
from ranks import run_on_ranks

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.certify.tiny_run import Outcome, alone, outcome_of, run_all

LOSSES = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top_k, shared expert": (
        {"router_type": "top_k", "shared_expert_intermediate_size": 8, "shared_expert_gate": True, **LOSSES},
        {"qk_layernorm": "projection"},
    ),
    "switch with capacity": (
        {"router_type": "switch", "expert_capacity_factor": 1.0, **LOSSES},
        {"normalization": "LayerNorm", "activation": "gelu"},
    ),
    "expert_choice": (
        {"router_type": "expert_choice", "allow_noncausal": True},
        {"qk_layernorm": "head", "untie_embeddings_and_output_weights": True},
    ),
}
LAYOUTS = [
    {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
]
# of three steps' losses: bf16 keeps 8 bits, and a loss is a mean over 32 tokens; float32 keeps 24
TOLERANCES = {"bf16": 2.0**-8, "fp32": 2.0**-18}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_narrow_training_follows_float64(dtype: str) -> None:
    cases = [(name, layout) for name in MODELS for layout in LAYOUTS]
    configs = [tiny_config(MODELS[name][0], layout, MODELS[name][1], dtype=dtype) for name, layout in cases]
    answers = run_on_ranks(4, run_all, configs)
    for name, (moe, model) in MODELS.items():
        wanted = alone(tiny_config(moe, {}, model))
        found: list[Outcome] = [alone(tiny_config(moe, {}, model, dtype=dtype))]
        found += [outcome_of([rank[at] for rank in answers]) for at, case in enumerate(cases) if case[0] == name]
        for outcome in found:
            assert outcome.losses == pytest.approx(wanted.losses, rel=TOLERANCES[dtype]), name
            assert outcome.losses != wanted.losses  # it was narrow indeed
