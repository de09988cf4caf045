"""The layouts on which a model must give what one process gives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
ZERO_3 = {"data_parallel_sharding_strategy": "optim_grads_params"}


@dataclass(frozen=True)
class Layout:
    """Ranks, fields of [parallel], and samples in a microbatch."""

    ranks: int
    parallel: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 1

    def samples_of_a_rank(self, global_batch: int) -> int:
        """Of one data-parallel rank in a step."""
        model_ranks = math.prod(int(self.parallel.get(name, 1)) for name in (TP, CP, PP))
        return global_batch * model_ranks // self.ranks


LAYOUTS: dict[str, Layout] = {
    "micro-batches of 2": Layout(1, {}, 2),
    "micro-batches of 4": Layout(1, {}, 4),
    "recomputation": Layout(1, {"recompute_granularity": "full"}),
    "recomputation, 2 layers at a time": Layout(1, {"recompute_granularity": "full", "recompute_num_layers": 2}),
    "recomputation of a stage's first layer": Layout(
        1, {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
    ),
    "recomputation of parts": Layout(
        1, {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm", "moe_act"]}, 2
    ),
    "recomputation of larger parts": Layout(
        1, {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]}
    ),
    "logits of 3 tokens at a time": Layout(1, {"cross_entropy_chunk_size": 3}),
    "TP 2 with sequence parallelism": Layout(2, {TP: 2}),
    "TP 2": Layout(2, {TP: 2, "sequence_parallel": False}, 2),
    "CP 2": Layout(2, {CP: 2}),
    "PP 2": Layout(2, {PP: 2}),
    "PP 2 sequential": Layout(2, {PP: 2, "pipeline_schedule": "sequential"}, 2),
    "PP 2 split backward": Layout(2, {PP: 2, "pipeline_schedule": "1f1b_split"}),
    "EP 2": Layout(2, {EP: 2}),
    "ETP 2": Layout(2, {ETP: 2}),
    "DP 2 with ZeRO-1": Layout(2),
    "DP 2 without ZeRO-1": Layout(2, {"use_distributed_optimizer": False}, 2),
    "DP 2 with ZeRO-3": Layout(2, ZERO_3),
    "CP 2 with ZeRO-3, recomputation of parts": Layout(
        2, {CP: 2, **ZERO_3, "recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act"]}, 2
    ),
    "TP 2 x DP 2 with ZeRO-3": Layout(4, {TP: 2, **ZERO_3}),
    "EP 2 x EDP 2 with ZeRO-3, recomputation": Layout(4, {EP: 2, **ZERO_3, "recompute_granularity": "full"}),
    "EP 2 folded over TP 2": Layout(2, {TP: 2, EP: 2, ETP: 1}),
    "EP 4": Layout(4, {EP: 4}),
    "PP 4": Layout(4, {PP: 4}),
    "TP 2 x PP 2, logits of 4 tokens at a time, split backward": Layout(
        4, {TP: 2, PP: 2, "cross_entropy_chunk_size": 4, "pipeline_schedule": "1f1b_split"}, 2
    ),
    "EP 4, at most an even part at a time": Layout(4, {EP: 4, "expert_rank_capacity_factor": 1.0}),
    "EP 2 x ETP 2, at most an even part at a time": Layout(4, {EP: 2, ETP: 2, "expert_rank_capacity_factor": 1.0}),
    "TP 2 x CP 2": Layout(4, {TP: 2, CP: 2}, 2),
    "EP 2 x ETP 2": Layout(4, {EP: 2, ETP: 2}),
    "TP 2 x PP 2 x EP 2": Layout(8, {TP: 2, PP: 2, EP: 2, ETP: 1}),
    "TP 2 x PP 2 x EP 2 x ETP 2": Layout(8, {TP: 2, PP: 2, EP: 2, ETP: 2}, 2),
    "TP 2 x EP 2, recomputation of parts": Layout(
        2, {TP: 2, EP: 2, ETP: 1, "recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act"]}
    ),
    "TP 2 x PP 2 x EP 2, recomputation, split backward": Layout(
        8, {TP: 2, PP: 2, EP: 2, ETP: 1, "recompute_granularity": "full", "pipeline_schedule": "1f1b_split"}
    ),
}
