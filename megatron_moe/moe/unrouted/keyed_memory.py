"""Memories whose cells are scored one by one: by keys as wide as a token, or by short keys of a low-rank product.

Source: "Towards A Unified View of Sparse Feed-Forward Network", arXiv:2305.13999: the feed-forward layer as a memory
act(x K^T) V, of which the k cells with the largest pre-activation are kept. From memory: that VanillaM keeps the full
key table, and that LoRKM's keys are K = D U with D (d_m, r) and U (r, H), r much smaller than H. This project's
reading: the choice is by pre-activation, before the non-linearity, so that cells at which relu is 0 rank too; what is
kept is act(score), and no other weight; scores are wide. U starts so that U x is about as large as x, and D so that
the scores are about as large as with keys of a feed-forward layer.

Guaranteed: exactly k cells for each token, of equal scores the lowest, whatever ranks the tables are split over;
nothing is random. Causal: a decision reads one token only. No loss, no capacity. VanillaM scores all d_m keys for
each token, (T, d_m) wide numbers, more than it saves: it is the reference that cheaper keys are held to.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_moe.config.options import option
from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.cell_choice import best_cells, gather_tokens
from megatron_moe.moe.unrouted.memory import CellOptions, MemoryLayer, Reads, activate, plain_activation, starts_of
from megatron_moe.moe.unrouted.unrouted_layer import Mixed
from megatron_moe.parallel.collectives import reduce_scatter


class VanillaMemoryLayer(MemoryLayer):
    """See the file's first lines."""

    Options = CellOptions
    facts = Facts(
        paper="VanillaM in arXiv:2305.13999",
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
        self.active = self.active_cells(self.options.active_cells, "active_cells")
        self.keys = self.new_table(self.site.hidden_size, self.site.init_std)

    def forward_flops(self, length: int) -> float:
        """All keys, and the values that are read."""
        return 2.0 * (self.site.hidden_size * self.active + self.num_cells * self.keys.shape[1])

    def queries(self, tokens: Tensor) -> Tensor:
        """(T, key width): what the keys are multiplied with."""
        return tokens

    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        given = gather_tokens(self.queries(tokens), info.is_padding, self.ep)
        wide = self.site.wide
        scores = given.rows.to(wide) @ self.keys.to(wide).t()
        chosen = best_cells(scores, self.active, self.ep)
        tokens_of, cells = chosen.nonzero(as_tuple=True)
        weights = activate(self.activation, scores.masked_select(chosen))
        partial = self.sum_of_values(Reads(cells, starts_of(chosen), weights))
        answers = reduce_scatter(partial, self.ep, given.counts)
        used = self.uses(cells + self.first_cell, ~given.is_padding[tokens_of])
        return Mixed(answers, self.report(info, used, {}))


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
        rank, hidden = self.options.rank, self.site.hidden_size
        self.activation = plain_activation(self.config, self.site.activation)
        self.active = self.active_cells(self.options.active_cells, "active_cells")
        self.keys = self.new_table(rank, self.site.init_std * (hidden / rank) ** 0.5)
        self.down = self.new_weight((rank, hidden), float(hidden**-0.5))

    def forward_flops(self, length: int) -> float:
        return super().forward_flops(length) + 2.0 * self.down.numel()

    def queries(self, tokens: Tensor) -> Tensor:
        """(T, r) wide."""
        return tokens.to(self.site.wide) @ self.down.t()
