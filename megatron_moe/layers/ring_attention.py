"""Ring attention: queries stay, keys and values pass all context-parallel ranks, each computes with what is there.

[Ring Attention, arXiv:2310.01889; cut into two chunks a rank against idle ranks, as in Striped Attention,
arXiv:2311.09431, and Megatron-LM.]  Letters: C rows of a chunk, half of a rank's; K keys of a tile; n = B·G.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_moe.layers.attention_core import Sight
from megatron_moe.layers.blockwise_softmax import Answer, RunningSoftmax, block_gradients
from megatron_moe.layers.context_parallel import own_chunks
from megatron_moe.ops.wide_product import wide_product
from megatron_moe.parallel.ring import Homeward, visitors
from megatron_moe.parallel.state import Axis

# Larger tiles are computed some keys at a time: so many scores exist at once, or those of so many keys if that is more
MOST_SCORES, FEWEST_KEYS = 1 << 20, 256


@dataclass(frozen=True)
class Tile:
    """Scores of one of my two chunks of queries for keys of one of a visitor's two chunks."""

    query: int  # 0 or 1, of mine
    rows: slice  # of these queries among mine
    key: int  # 0 or 1, of the visitor's
    keys: slice  # in that chunk
    columns: slice  # of these keys in their sequence
    masked: bool  # False: every query sees every key


@dataclass(frozen=True)
class Tiling:
    """What this rank computes with a visitor, and what is added to the scores."""

    sight: Sight  # without its bias
    cp: Axis
    keys_at_once: int

    def tiles(self, sender: int) -> Iterator[Tile]:
        """Only those in which some query may see some key, as far as the order of the sequence tells."""
        sight, size = self.sight, self.cp.size
        rows, columns = sight.queries.num_rows // 2, sight.keys.num_rows // 2
        for query, mine in enumerate(own_chunks(size, self.cp.rank)):
            for key, theirs in enumerate(own_chunks(size, sender)):
                if sight.causal and theirs > mine and sight.keys.prefix is None:
                    continue
                for start in range(0, columns, self.keys_at_once):
                    stop = min(start + self.keys_at_once, columns)
                    yield Tile(
                        query,
                        slice(query * rows, (query + 1) * rows),
                        key,
                        slice(start, stop),
                        slice(theirs * columns + start, theirs * columns + stop),
                        masked=sight.segmented or (sight.causal and theirs >= mine),
                    )

    def scores(self, tile: Tile, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """(n, q·C, K) wide.   query: (n, q·C, D).   key: (n, K, D).   bias: (1 or B, heads, 2·C, S')."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = wide_product(query, key.transpose(1, 2), wide).mul_(scale_of(query))
        by_head = self.by_head(scores, tile)
        if bias is not None:
            by_head += bias[:, :, tile.rows, tile.columns]
        if tile.masked:
            places = torch.arange(tile.columns.start, tile.columns.stop, device=query.device)
            by_head.masked_fill_(~self.sight.allowed(self.sight.queries.rows[tile.rows], places), float("-inf"))
        return scores

    def by_head(self, scores: Tensor, tile: Tile) -> Tensor:
        """(n, q·C, K) as (B, heads, C, K)."""
        rows = tile.rows.stop - tile.rows.start
        return scores.view(self.sight.queries.num_samples, -1, rows, scores.shape[-1])


class RingAttention:
    """Exact attention with the keys and values of two ranks in memory: mine, and those that pass.

    A rank sends its keys and values (cp-1) times; backwards also, in wide precision, their gradients. Kept for the
    backward pass: queries, own keys and values, the answer, and one number for each query and head. Plain products:
    torch does not say in public how to merge the answers of its fused ones.
    """

    def __init__(self, cp: Axis, *, most_scores: int = MOST_SCORES, fewest_keys: int = FEWEST_KEYS) -> None:
        self.cp = cp
        self.most_scores = most_scores
        self.fewest_keys = fewest_keys

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        if sight.cached:
            raise ValueError("tokens are decoded without context parallelism")
        scores_of_a_key = query.numel() // query.shape[-1] // 2
        keys_at_once = max(self.fewest_keys, self.most_scores // scores_of_a_key)
        tiling = Tiling(replace(sight, bias=None), self.cp, keys_at_once)
        found: Tensor = _Ring.apply(query, key, value, sight.bias, tiling)
        return found


class _Ring(Function):
    """Every rank comes here or none: each passes on what its neighbour waits for."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, tiling: Tiling
    ) -> Tensor:
        chunks = in_chunks(query)
        both = torch.stack([in_chunks(key[:, :, :, None]), in_chunks(value[:, :, :, None])])
        wide = torch.promote_types(query.dtype, torch.float32)
        found = [RunningSoftmax(chunk, wide) for chunk in chunks]
        for sender, (keys, values) in visitors(both, tiling.cp):
            for tile in tiling.tiles(sender):
                scores = tiling.scores(tile, chunks[tile.query], keys[tile.key, :, tile.keys], bias)
                found[tile.query].add(scores, values[tile.key, :, tile.keys])
        mixed = torch.stack([chunk.mixed() for chunk in found]).to(query.dtype)
        log_sums = torch.stack([chunk.log_sum() for chunk in found])
        ctx.save_for_backward(chunks, both, bias, mixed, log_sums)
        ctx.tiling, ctx.shapes = tiling, (query.shape, key.shape)
        return in_rows(mixed, query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        chunks, both, bias, mixed, log_sums = ctx.saved_tensors
        tiling = ctx.tiling
        wide = log_sums.dtype
        gradients = in_chunks(gradient)
        shares = (gradients.to(wide) * mixed).sum(dim=-1)
        answers = [Answer(*of_chunk) for of_chunk in zip(gradients, shares, log_sums, strict=True)]
        of_query = torch.zeros_like(chunks, dtype=wide)
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        home = Homeward(tiling.cp)
        for sender, (keys, values) in visitors(both, tiling.cp):
            of_visitor = torch.zeros_like(both, dtype=wide)
            for tile in tiling.tiles(sender):
                query, key, value = chunks[tile.query], *(side[tile.key, :, tile.keys] for side in (keys, values))
                scores = tiling.scores(tile, query, key, bias)
                found = block_gradients(scores, answers[tile.query], query, key, value)
                of_query[tile.query] += found.query
                of_visitor[0, tile.key, :, tile.keys] += found.key
                of_visitor[1, tile.key, :, tile.keys] += found.value
                if of_bias is not None:
                    by_head = tiling.by_head(found.scores, tile)
                    of_bias[:, :, tile.rows, tile.columns] = by_head.sum_to_size(bias.shape[0], *by_head.shape[1:])
            home.add(of_visitor)
        of_keys, of_values = home.total()
        query_shape, key_shape = ctx.shapes
        scale = scale_of(chunks)
        key_rows = (*key_shape[:3], 1, key_shape[3])
        return (
            in_rows(of_query.mul_(scale).to(gradient.dtype), query_shape),
            in_rows(of_keys.mul_(scale).to(both.dtype), key_rows).squeeze(3),
            in_rows(of_values.to(both.dtype), key_rows).squeeze(3),
            of_bias,
            None,
        )


def scale_of(queries: Tensor) -> float:
    """What scores are multiplied with: 1/√D."""
    return float(queries.shape[-1] ** -0.5)


def in_chunks(rows: Tensor) -> Tensor:
    """(2·C, B, G, q, D) -> (2, B·G, q·C, D), each chunk in one piece."""
    length, samples, groups, per_group, width = rows.shape
    chunks = rows.reshape(2, length // 2, samples, groups, per_group, width).permute(0, 2, 3, 4, 1, 5)
    return chunks.reshape(2, samples * groups, per_group * (length // 2), width)


def in_rows(chunks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(2, B·G, q·C, D) -> (2·C, B, G, q, D), which is `shape`."""
    length, samples, groups, per_group, width = shape
    rows = chunks.view(2, samples, groups, per_group, length // 2, width).permute(0, 4, 1, 2, 3, 5)
    return rows.reshape(shape)
