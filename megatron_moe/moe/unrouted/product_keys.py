"""Product-key memory: n² cells found by two short searches among n sub-keys each.

Source: Lample et al., arXiv:1907.05242, section 3, and its public code (facebookresearch/XLM, PKM-layer.ipynb): for
each head a query q = norm(x W_q) in two halves, the knn best of q1 K1^T and of q2 K2^T, the knn best of their knn²
sums (exactly the knn best of all n²), w = softmax of these, y = Σ_heads Σ w · V; 4 heads, 32 neighbours, keys of width
128. Its query normalisation over the batch is query_norm=batch, here over the tokens of a routing group, with running
statistics for evaluation; it is not causal in training, so the default is over the query (`layer`). Its sub-keys are
uniform(±(d_k/2)^-0.5); here they are normal with the same deviation. From memory: PKM-FFN (arXiv:2305.13999), product
keys as the key table of a feed-forward layer, whose non-linearity replaces the softmax, with one head.

Guaranteed: knn cells for each head and token; nothing is random. Causal unless query_norm=batch. No loss, no capacity.
The paper trains the values with an Adam of their own at a constant rate, which this project leaves to the one
optimizer.
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
from megatron_moe.moe.unrouted.memory import MemoryLayer, activate, largest, plain_activation
from megatron_moe.moe.unrouted.query_norm import BatchNorm
from megatron_moe.moe.unrouted.unrouted_layer import Mixed
from megatron_moe.parallel.collectives import gather_counts, gather_for_partial, reduce_scatter

NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class ProductKeyOptions:
    """What product_keys alone can be told."""

    heads: int = option(4, "queries of a token", at_least=1)
    key_dim: int = option(128, "width of a query: two sub-keys of half of it", at_least=2)
    knn: int | None = option(
        None, "cells of a head; none = as many in all heads as router_topk experts are wide", at_least=1
    )
    query_norm: str = option("layer", "what queries are normalised over", choices=("layer", "batch", "none"))


class ProductKeysLayer(MemoryLayer):
    """See the file's first lines."""

    Options = ProductKeyOptions
    facts = Facts(
        paper="product-key memory, arXiv:1907.05242",
        chooses="token, by product keys",
        batch_independent=True,
        scores="sum of two sub-scores",
        weights="softmax over the cells of a head, summed over heads",
        capacity="dropless, knn cells of each head",
        good_for="very many cells: n² values for 2n keys",
        example={"router_topk": 1, "ffn_hidden_size": 16, "router_options": {"heads": "2", "key_dim": "6", "knn": "3"}},
    )
    unused_fields: ClassVar[tuple[str, ...]] = (*MemoryLayer.unused_fields, "activation")
    options: ProductKeyOptions

    def make_parameters(self) -> None:
        options, hidden = self.options, self.site.hidden_size
        self.num_sub_keys = math.isqrt(self.num_cells)
        if self.num_sub_keys**2 != self.num_cells:
            raise ConfigError(
                f"--num-experts {self.config.num_experts} x --moe-ffn-hidden-size {self.site.ffn_size} = "
                f"{self.num_cells} cells are no square, as product keys need; use "
                f"{self.num_sub_keys**2} or {(self.num_sub_keys + 1) ** 2}."
            )
        if options.key_dim % 2:
            raise ConfigError(f"--moe-router-options key_dim={options.key_dim}: expected an even number.")
        self.neighbours = options.knn or self._all_neighbours()
        if self.neighbours > self.num_sub_keys:
            raise ConfigError(
                f"--moe-router-options knn={self.neighbours} asks for more neighbours than the {self.num_sub_keys} "
                f"sub-keys of each half; use fewer, or more heads."
            )
        half = options.key_dim // 2
        self.query = self.new_weight((options.heads * options.key_dim, hidden), hidden**-0.5)
        # the deviation of uniform(-a, a) is a / sqrt(3)
        self.sub_keys = self.new_weight((options.heads, 2, self.num_sub_keys, half), (3 * half) ** -0.5)
        if options.query_norm == "batch":
            self.is_causal = False
            self.batch_norm = BatchNorm(options.heads * options.key_dim, self.group_axis, self.site.wide)

    def _all_neighbours(self) -> int:
        cells = self.config.router_topk * self.site.ffn_size
        if cells % self.options.heads:
            raise ConfigError(
                f"{cells} active cells (--moe-router-topk x --moe-ffn-hidden-size) do not fall evenly to "
                f"heads={self.options.heads}; give --moe-router-options knn=..."
            )
        return cells // self.options.heads

    def value_std(self) -> float:
        return float(self.site.hidden_size**-0.5)

    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        queries, stats = self._queries(tokens, info)
        cells, scores = self._neighbours(queries)
        weights = self.weigh(scores)
        counts = gather_counts(tokens.shape[0], self.ep, tokens.device)
        everyone = self.ep.comm.all_gather(cells.flatten(1), counts)
        partial = self.sum_of_values(everyone, gather_for_partial(weights.flatten(1), self.ep, counts))
        answers = reduce_scatter(partial, self.ep, counts)
        used = self.uses(cells.flatten(1), ~info.is_padding[:, None].expand(-1, cells[0].numel() if len(cells) else 0))
        return Mixed(answers.to(tokens.dtype), self.report(info, used, stats))

    def _queries(self, tokens: Tensor, info: TokenInfo) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, heads, 2, key_dim / 2) wide, and what their normalisation has to remember."""
        options = self.options
        flat = tokens.to(self.site.wide) @ self.query.t()
        stats: dict[str, Tensor] = {}
        if options.query_norm == "batch":
            flat, stats = self.batch_norm(flat, info)
        heads = flat.view(-1, options.heads, options.key_dim)
        if options.query_norm == "layer":
            heads = F.layer_norm(heads, heads.shape[-1:], eps=NORM_EPSILON)
        return heads.view(-1, options.heads, 2, options.key_dim // 2), stats

    def _neighbours(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(T, heads, knn) cells, best first, and their scores with gradient."""
        knn = self.neighbours
        halves = torch.einsum("thpd,hpnd->thpn", queries, self.sub_keys)
        best = largest(halves, knn)
        found = halves.gather(3, best)
        sums = (found[:, :, 0, :, None] + found[:, :, 1, None, :]).flatten(2)
        numbers = (best[:, :, 0, :, None] * self.num_sub_keys + best[:, :, 1, None, :]).flatten(2)
        chosen = largest(sums, knn)
        return numbers.gather(2, chosen), sums.gather(2, chosen)

    def weigh(self, scores: Tensor) -> Tensor:
        """(T, heads, knn) wide."""
        return scores.softmax(dim=2)

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        if self.options.query_norm == "batch":
            self.batch_norm.remember(own)


@dataclass(frozen=True, kw_only=True)
class ProductKeyFFNOptions(ProductKeyOptions):
    """What product_keys_ffn alone can be told."""

    heads: int = option(1, "queries of a token", at_least=1)


class ProductKeysFFNLayer(ProductKeysLayer):
    """See the file's first lines."""

    Options = ProductKeyFFNOptions
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
            "router_topk": 1,
            "ffn_hidden_size": 16,
            "router_options": {"key_dim": "6", "knn": "5"},
        },
    )
    unused_fields: ClassVar[tuple[str, ...]] = MemoryLayer.unused_fields

    def make_parameters(self) -> None:
        super().make_parameters()
        self.activation = plain_activation(self.config, self.site.activation)

    def value_std(self) -> float:
        return self.site.output_std

    def weigh(self, scores: Tensor) -> Tensor:
        """(T, heads, knn) wide."""
        return activate(self.activation, scores)
