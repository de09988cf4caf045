"""RandHash: each token id is tied to b memory blocks, drawn once and kept: the indirect selection without learning.

Source: Liu et al. (Avg-K), arXiv:2305.13999, who view a sparse feed-forward layer as a memory of B blocks with g cells
and compare ways to select b blocks at g · b active cells; the fixed random map after Hash Layers (arXiv:2106.04426) is
one of them. This project's reading: weight 1, as in a memory whose selected cells are added up, and the b blocks of an
id are different ones.

--num-experts is B, --moe-ffn-hidden-size g and --moe-router-topk b. Unlike MultiHash (hash.py) any b of all B blocks
can meet. Each layer draws a map of its own from the run's seed; it is saved with the checkpoint.

Guaranteed: b different blocks with weight 1, no parameters, no loss, nothing random; ids alone decide. Causal: it reads
the token's own id. Dropless in the paper; --moe-expert-capacity-factor drops by position.
"""

from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.hash_tables import distinct_table, known_ids
from megatron_moe.moe.routers.router import Router
from megatron_moe.parallel.random import KeyedRandom


class RandHashRouter(Router):
    """See the file's first lines."""

    is_causal = True
    dispatcher = "one_per_rank"  # small blocks: a rank holds several of a token's
    facts = Facts(
        paper="Avg-K, arXiv:2305.13999; Hash Layers, arXiv:2106.04426",
        chooses="nobody",
        batch_independent=True,
        scores="none",
        weights="1",
        capacity="dropless",
        good_for="small memory blocks without a learned choice, the control of avg_k",
    )
    unused_fields: ClassVar[tuple[str, ...]] = (
        "router_pre_softmax",
        "aux_loss_coeff",
        "z_loss_coeff",
        "token_drop_policy",
    )
    table: Tensor  # (V, b) int64

    def setup(self) -> None:
        random = KeyedRandom(self.site.seed, stream="rand_hash", layer=self.site.layer)
        config = self.config
        self.new_state("table", distinct_table(self.site.vocab_size, config.router_topk, config.num_experts, random))

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Blocks of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H), not looked at."""
        expert_ids = self.table[known_ids(info.ids, info)]
        return self.plan(expert_ids, torch.ones_like(expert_ids, dtype=self.dtype), info)
