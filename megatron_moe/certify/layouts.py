"""The layouts on which a model must give what one process gives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
ROUNDS = "num_virtual_stages_per_pipeline_rank"
COMM = "cp_comm_type"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
NODE = "expert_model_parallel_ranks_per_node"
ZERO_3 = {"data_parallel_sharding_strategy": "optim_grads_params"}


@dataclass(frozen=True)
class Layout:
    """Ranks, fields of [parallel], and samples in a microbatch.

    uneven: four stages of very different sizes, written out for each model.
    """

    ranks: int
    parallel: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 1
    uneven: bool = False

    def fields_for(self, encoder_layers: int, decoder_layers: int) -> dict[str, Any]:
        """Fields of [parallel] for a model of so many layers."""
        if not self.uneven:
            return dict(self.parallel)
        layers = "e" * encoder_layers + "t" * decoder_layers
        return {**self.parallel, "pipeline_model_parallel_layout": f"E|{layers[0]}|{layers[1:-1]}|{layers[-1]}L"}

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
    "TP 2 with sequence parallelism and overlap": Layout(2, {TP: 2, "tp_comm_overlap": True}),
    "TP 2 with overlap": Layout(2, {TP: 2, "sequence_parallel": False, "tp_comm_overlap": True}, 2),
    "CP 2": Layout(2, {CP: 2}),
    "CP 2 ring": Layout(2, {CP: 2, COMM: "p2p"}, 2),
    "CP 2 all-to-all": Layout(2, {CP: 2, COMM: "a2a"}),
    "PP 2": Layout(2, {PP: 2}),
    "PP 2 sequential": Layout(2, {PP: 2, "pipeline_schedule": "sequential"}, 2),
    "PP 2 split backward": Layout(2, {PP: 2, "pipeline_schedule": "1f1b_split"}),
    "PP 2 interleaved": Layout(2, {PP: 2, ROUNDS: 2}),
    "PP 2 interleaved, embedding and head alone": Layout(
        2,
        {
            PP: 2,
            ROUNDS: 3,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    "PP 2 interleaved, uneven": Layout(2, {PP: 2}, uneven=True),
    "EP 2": Layout(2, {EP: 2}),
    "EP 2 overlapped": Layout(2, {EP: 2, "pipeline_schedule": "1f1b_overlap"}),
    "PP 2 x EP 2 overlapped, recomputation": Layout(
        4, {PP: 2, EP: 2, "pipeline_schedule": "1f1b_overlap", "recompute_granularity": "full"}
    ),
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
    "EP 4 as 2 nodes of 2": Layout(4, {EP: 4, NODE: 2}),
    "PP 4": Layout(4, {PP: 4}),
    "TP 2 x PP 2, logits of 4 tokens at a time, split backward": Layout(
        4, {TP: 2, PP: 2, "cross_entropy_chunk_size": 4, "pipeline_schedule": "1f1b_split"}, 2
    ),
    "TP 2 x PP 2 interleaved": Layout(4, {TP: 2, PP: 2, ROUNDS: 2}, 2),
    "TP 2 x PP 2 with overlap, recomputation of norms, split backward": Layout(
        4,
        {
            TP: 2,
            PP: 2,
            "tp_comm_overlap": True,
            "recompute_granularity": "selective",
            "recompute_modules": ["layernorm"],
            "pipeline_schedule": "1f1b_split",
        },
    ),
    "EP 4, at most an even part at a time": Layout(4, {EP: 4, "expert_rank_capacity_factor": 1.0}),
    "EP 2 x ETP 2, at most an even part at a time": Layout(4, {EP: 2, ETP: 2, "expert_rank_capacity_factor": 1.0}),
    "TP 2 x CP 2": Layout(4, {TP: 2, CP: 2}, 2),
    "TP 2 x CP 2 ring": Layout(4, {TP: 2, CP: 2, COMM: "p2p"}),
    "CP 2 x PP 2 ring, recomputation of parts": Layout(
        4, {CP: 2, PP: 2, COMM: "p2p", "recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    ),
    "EP 2 x ETP 2": Layout(4, {EP: 2, ETP: 2}),
    "TP 2 x PP 2 x EP 2": Layout(8, {TP: 2, PP: 2, EP: 2, ETP: 1}),
    "TP 2 x PP 2 x EP 2 x ETP 2": Layout(8, {TP: 2, PP: 2, EP: 2, ETP: 2}, 2),
    "TP 2 x EP 4 as 2 nodes of 2, at most an even part at a time, recomputation": Layout(
        4,
        {TP: 2, EP: 4, NODE: 2, ETP: 1, "expert_rank_capacity_factor": 1.0, "recompute_granularity": "full"},
        2,
    ),
    "TP 2 x EP 2, recomputation of parts": Layout(
        2, {TP: 2, EP: 2, ETP: 1, "recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act"]}
    ),
    "TP 2 x PP 2 x EP 2, recomputation, split backward": Layout(
        8, {TP: 2, PP: 2, EP: 2, ETP: 1, "recompute_granularity": "full", "pipeline_schedule": "1f1b_split"}
    ),
}
