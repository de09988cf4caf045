"""Product-key memory: n² cells found by two short searches among n sub-keys each.

Source: Lample et al., arXiv:1907.05242, section 3, and its public code (facebookresearch/XLM, PKM-layer.ipynb): for
each head a query q = norm(x W_q) in two halves, the knn best of q1 K1^T and of q2 K2^T, the knn best of their sums
(exactly the knn best of all n²), w = softmax of these, y = Σ_heads Σ w · V, V of normal(0, H^-0.5) shared by the heads;
4 heads, 32 neighbours, queries of width 128, 512 sub-keys. This project's reading: a normalised query gets a learned
shift (query_bias), as batch normalisation has there; a scale would be no more than other sub-keys. query_norm=batch,
the code's choice, is over the non-padding tokens of a routing group, with running statistics for evaluation; it is not
causal in training, so the default is over each head's query (layer). Sub-keys are uniform(±(d_k/2)^-0.5) there; here
they are normal of the same deviation. Cells are as many as router_topk experts are wide, for all heads together, so
that methods can be compared; the paper's number is --moe-router-options knn=32.

From memory: PKM-FFN (arXiv:2305.13999): product keys are the key table of a feed-forward layer, whose non-linearity
replaces the softmax, with one head.

Guaranteed: knn cells for each head and token, of equal scores those with the better first half; nothing is random.
Causal unless query_norm=batch. No loss, no capacity. The paper trains the values with an Adam of their own at a
constant rate, which this project leaves to the one optimizer.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import option
from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.memory import CellOptions, MemoryLayer, activate, plain_activation
from megatron_moe.moe.unrouted.product_search import best_sums
from megatron_moe.moe.unrouted.query_norm import EPSILON, BatchNorm
from megatron_moe.moe.unrouted.unrouted_layer import Mixed
from megatron_moe.parallel.collectives import gather_counts, gather_for_partial, reduce_scatter
from megatron_moe.parallel.layout import ParamLayout, new_parameter


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """What both kinds can be told."""

    num_subkeys: int | None = option(
        None, "n, for n² cells; none = the root of num_experts times the width of an expert", at_least=1
    )
    key_dim: int = option(128, "width of a query, of which a sub-key has half", at_least=2)
    query_norm: str = option("layer", "what queries are normalised over", choices=("layer", "batch", "none"))


@dataclass(frozen=True, kw_only=True)
class ProductKeyOptions(QueryOptions):
    """What product_keys alone can be told."""

    heads: int = option(4, "queries of a token", at_least=1)
    knn: int | None = option(
        None, "cells of a head; none = in all heads as many as router_topk experts are wide", at_least=1
    )


class ProductKeysLayer(MemoryLayer):
    """See the file's first lines."""

    Options: ClassVar[type] = ProductKeyOptions
    facts = Facts(
        paper="product-key memory, arXiv:1907.05242",
        chooses="token, by product keys",
        batch_independent=True,
        scores="sum of two sub-scores",
        weights="softmax over the cells of a head, summed over heads",
        capacity="dropless, knn cells of each head",
        good_for="very many cells: n² values for 2n keys",
        example={"ffn_hidden_size": 16, "router_options": {"heads": "2", "key_dim": "6", "knn": "3"}},
    )
    unused_fields: ClassVar[tuple[str, ...]] = (*MemoryLayer.unused_fields, "activation")

    def make_parameters(self) -> None:
        options, hidden, wide = self.options, self.site.hidden_size, self.site.wide
        if options.key_dim % 2:
            raise ConfigError(f"--moe-router-options key_dim={options.key_dim}: expected an even number.")
        self.num_heads, self.knn = self.count_reads()
        width, half = self.num_heads * options.key_dim, options.key_dim // 2
        self.query = self.new_weight((width, hidden), float(hidden**-0.5))
        self.query_bias = new_parameter(ParamLayout((width,), sum_over=("tp",), decay=False), dtype=wide)
        # the deviation of uniform(-a, a) is a / sqrt(3)
        self.sub_keys = self.new_weight((self.num_heads, 2, self.num_subkeys, half), float((3 * half) ** -0.5))
        if options.query_norm == "batch":
            self.is_causal = False
            self.batch_norm = BatchNorm(width, self.group_axis, wide)

    def count_cells(self) -> int:
        """n². ConfigError where it is not what num_experts and their width say, or not whole runs for the experts."""
        experts, inner, asked = self.config.num_experts, self.config.ffn_hidden_size, self.options.num_subkeys
        cells = experts * self.site.ffn_size
        self.num_subkeys = asked or math.isqrt(cells)
        found = self.num_subkeys**2
        if asked and inner and found != cells:
            raise ConfigError(
                f"--moe-router-options num_subkeys={asked} makes {found} cells, but --num-experts {experts} x "
                f"--moe-ffn-hidden-size {inner} makes {cells}; leave one of them out."
            )
        if found % experts or not (asked or found == cells):
            step = next(root for root in range(1, experts + 1) if root**2 % experts == 0)
            near = max(1, round(self.num_subkeys / step)) * step
            raise ConfigError(
                f"{found if asked else cells} cells ({f'num_subkeys={asked}' if asked else 'num_experts x their width'}"
                f") are not the square of a whole number that falls evenly to --num-experts {experts}, as product keys "
                f"need; give --moe-router-options num_subkeys={near}, without --moe-ffn-hidden-size."
            )
        return found

    def count_reads(self) -> tuple[int, int]:
        """Heads, and cells of each."""
        heads, knn = self.options.heads, self.options.knn
        cells = self.active_cells(knn, "knn")
        if knn is not None:
            return heads, knn
        if cells % heads:
            raise ConfigError(
                f"{cells} active cells (--moe-router-topk x the width of an expert) do not fall evenly to "
                f"--moe-router-options heads={heads}; give knn=..., the cells of a head."
            )
        return heads, cells // heads

    def value_std(self) -> float:
        return float(self.site.hidden_size**-0.5)

    def forward_flops(self, length: int) -> float:
        """Queries, all sub-keys, and the values that are read."""
        read = self.num_heads * self.knn * self.site.hidden_size
        return 2.0 * (self.query.numel() + self.sub_keys.numel() + read)

    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        queries, stats = self._queries(tokens, info)
        cells, scores = best_sums(torch.einsum("thpd,hpnd->thpn", queries, self.sub_keys), self.knn)
        weights = self.weigh(scores)
        used = self.uses(cells, ~info.is_padding[:, None, None].expand_as(cells))
        # few numbers a token: every rank of ep gets all, and sums its own rows
        counts = gather_counts(tokens.shape[0], self.ep, tokens.device)
        everyone = self.ep.comm.all_gather(cells.flatten(1), counts)
        reads = self.reads_of(everyone, gather_for_partial(weights.flatten(1), self.ep, counts))
        answers = reduce_scatter(self.sum_of_values(reads), self.ep, counts)
        return Mixed(answers, self.report(info, used, {**stats, **self.weight_stats(weights.detach(), info)}))

    def _queries(self, tokens: Tensor, info: TokenInfo) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, heads, 2, key_dim / 2) wide, and what their normalisation has to remember."""
        options = self.options
        flat = tokens.to(self.site.wide) @ self.query.t()
        stats: dict[str, Tensor] = {}
        if options.query_norm == "batch":
            flat, stats = self.batch_norm(flat, info)
        elif options.query_norm == "layer":
            heads = flat.unflatten(1, (self.num_heads, options.key_dim))
            flat = F.layer_norm(heads, heads.shape[-1:], eps=EPSILON).flatten(1)
        return (flat + self.query_bias).unflatten(1, (self.num_heads, 2, options.key_dim // 2)), stats

    def weigh(self, scores: Tensor) -> Tensor:
        """(T, heads, knn) wide."""
        return scores.softmax(dim=2)

    def weight_stats(self, weights: Tensor, info: TokenInfo) -> dict[str, Tensor]:
        """Entropy of a head's weights in nats, mean of the heads, summed over non-padding tokens."""
        entropy = torch.special.entr(weights).sum(dim=2).mean(dim=1)
        return {"entropy_sum": entropy.masked_fill(info.is_padding, 0.0).sum()}

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        if self.options.query_norm == "batch":
            self.batch_norm.remember(own)


@dataclass(frozen=True, kw_only=True)
class ProductKeyFFNOptions(QueryOptions, CellOptions):
    """What product_keys_ffn alone can be told."""


class ProductKeysFFNLayer(ProductKeysLayer):
    """See the file's first lines."""

    Options: ClassVar[type] = ProductKeyFFNOptions
    facts = Facts(
        paper="PKM-FFN in arXiv:2305.13999",
        chooses="token, by product keys",
        batch_independent=True,
        scores="sum of two sub-scores",
        weights="act(score)",
        capacity="dropless, k cells",
        good_for="a feed-forward layer of n² cells for 2n keys",
        example={
            "activation": "relu",
            "ffn_hidden_size": 16,
            "router_options": {"key_dim": "6", "active_cells": "5"},
        },
    )
    unused_fields: ClassVar[tuple[str, ...]] = MemoryLayer.unused_fields

    def make_parameters(self) -> None:
        self.activation = plain_activation(self.config, self.site.activation)
        super().make_parameters()

    def count_reads(self) -> tuple[int, int]:
        return 1, self.active_cells(self.options.active_cells, "active_cells")

    def value_std(self) -> float:
        return self.site.output_std

    def weigh(self, scores: Tensor) -> Tensor:
        """(T, 1, k) wide."""
        return activate(self.activation, scores)

    def weight_stats(self, weights: Tensor, info: TokenInfo) -> dict[str, Tensor]:
        """None: the weights are no distribution."""
        return {}
