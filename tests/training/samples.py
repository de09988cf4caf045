"""A log record and routing statistics for the tests of this room."""

from dataclasses import replace
from typing import Any

import torch

from megatron_moe.training.console import StepRecord
from megatron_moe.training.metrics import LayerStats, RoutingSummary

RECORD = StepRecord(
    step=20,
    total_steps=300,
    consumed_samples=320,
    global_batch_size=16,
    seconds=0.25,
    tokens=8192,
    world_size=4,
    flops=8e12,
    peak_flops=80e12,
    loss=5.5,
    aux_losses={"load_balance_loss": 1.25, "z_loss": 3.5},
    learning_rate=6e-4,
    grad_norm=1.75,
    routing=RoutingSummary(max_violation=0.5, drop_rate=0.125, unserved_rate=0.0625, entropy=1.5, dead_experts=2),
    gpu=None,
)
DENSE = replace(RECORD, aux_losses={}, routing=None, peak_flops=None)


def record(step: int, **changes: Any) -> StepRecord:
    return replace(RECORD, step=step, **changes)


def layer_stats(requested: list[int], served: list[int], tokens: int, unserved: int, entropy: float) -> LayerStats:
    """The statistics of one layer, numbered 1, as MetricsReducer hands them over."""
    values = {
        "requested": torch.tensor(requested),
        "tokens_per_expert": torch.tensor(served),
        "tokens": torch.tensor(tokens),
        "tokens_unserved": torch.tensor(unserved),
        "entropy_sum": torch.tensor(entropy),
    }
    return {1: {name: value.double() for name, value in values.items()}}
