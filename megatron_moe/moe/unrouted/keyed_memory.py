"""Memories whose cells are scored one by one: by keys as wide as a token, or by short keys of a low-rank product.

Source: "Towards A Unified View of Sparse Feed-Forward Network", arXiv:2305.13999: the feed-forward layer as a memory
act(x K^T) V, of which the k cells with the largest pre-activation are kept. From memory: that VanillaM keeps the full
key table, and that LoRKM's keys are K = D U with D (d_m, r) and U (r, H), r much smaller than H. This project's
reading: the choice is by pre-activation; what is kept is act(score), and no other weight.

Guaranteed: exactly k cells for each token, whatever ranks the tables are split over; nothing is random. Causal: a
decision reads one token only. No loss, no capacity. VanillaM scores all d_m keys for each token, more than it saves:
it is the reference that cheaper keys are held to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import option
from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.cell_choice import best_cells, gather_tokens
from megatron_moe.moe.unrouted.memory import MemoryLayer, activate, plain_activation
from megatron_moe.moe.unrouted.unrouted_layer import Mixed
from megatron_moe.parallel.collectives import reduce_scatter


@dataclass(frozen=True, kw_only=True)
class CellOptions:
    """What vanilla_memory alone can be told."""

    active_cells: int | None = option(
        None, "cells of a token; none = router_topk times the width of an expert", at_least=1
    )


class VanillaMemoryLayer(MemoryLayer):
    """See the file's first lines."""

    Options = CellOptions
    facts = Facts(
        paper="sparse feed-forward networks, arXiv:2305.13999",
        chooses="token, by the cells' own keys",
        batch_independent=True,
        scores="pre-activation",
        weights="act(score)",
        capacity="dropless, k cells",
        good_for="the finest choice there is: a reference for every cheaper way of choosing",
        example={"activation": "relu", "router_topk": 1},
    )
    options: CellOptions

    def make_parameters(self) -> None:
        self.activation = plain_activation(self.config, self.site.activation)
        self.keys = self.new_table(self.num_cells, self.key_width(), self.site.init_std)
        self.active_cells = self.options.active_cells or self.config.router_topk * self.site.ffn_size
        if self.active_cells > self.num_cells:
            raise ConfigError(
                f"--moe-router-options active_cells={self.active_cells} asks for more than the memory's "
                f"{self.num_cells} cells; use fewer."
            )

    def key_width(self) -> int:
        """Of a key, and of what a token is asked with."""
        return self.site.hidden_size

    def queries(self, tokens: Tensor) -> Tensor:
        """(T, key width)."""
        return tokens

    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        given = gather_tokens(self.queries(tokens), info.is_padding, self.ep)
        scores = (given.rows @ self.keys.to(given.rows.dtype).t()).to(self.site.wide)
        mine, chosen = best_cells(scores, self.active_cells, self.ep)
        weights = activate(self.activation, scores.gather(1, mine)).masked_fill(~chosen, 0.0)
        cells = mine + self.first_cell
        answers = reduce_scatter(self.sum_of_values(cells, weights), self.ep, given.counts)
        used = self.uses(cells, chosen & ~given.is_padding[:, None])
        return Mixed(answers.to(tokens.dtype), self.report(info, used, {}))


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(CellOptions):
    """What low_rank_keys alone can be told."""

    rank: int = option(16, "r: width of a short key", at_least=1)


class LowRankKeysLayer(VanillaMemoryLayer):
    """See the file's first lines."""

    Options = LowRankOptions
    facts = Facts(
        paper="LoRKM in arXiv:2305.13999",
        chooses="token, by short keys",
        batch_independent=True,
        scores="pre-activation of a low-rank key",
        weights="act(score)",
        capacity="dropless, k cells",
        good_for="single cells at the price of r(H + d_m) instead of H·d_m products",
        example={"activation": "relu", "router_topk": 1, "router_options": {"rank": "5"}},
    )
    options: LowRankOptions

    def make_parameters(self) -> None:
        super().make_parameters()
        self.down = self.new_weight((self.options.rank, self.site.hidden_size), self.site.hidden_size**-0.5)

    def key_width(self) -> int:
        return self.options.rank

    def queries(self, tokens: Tensor) -> Tensor:
        """(T, r) wide."""
        return tokens.to(self.site.wide) @ self.down.t()


def dense_memory(tokens: Tensor, keys: Tensor, values: Tensor, activation: str) -> Tensor:
    """(T, H): all cells, which is a dense feed-forward layer; what k = d_m is held to."""
    return torch.matmul(activate(activation, tokens @ keys.t()), values)
