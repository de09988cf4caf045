"""Attention whose scores come block after block: a softmax that runs along, and what one block gives backwards.

Nothing of the size of all scores is ever there. Letters: n samples times key-value groups, R queries (all heads of a
group, one after another), C keys of a block.  [FlashAttention-2, arXiv:2307.08691, sections 3.1 and 3.2]
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.ops.wide_product import wide_product


class RunningSoftmax:
    """Values (n, C, D) mixed for queries (n, R, D) by the softmax over all blocks of scores so far."""

    def __init__(self, queries: Tensor, wide: torch.dtype) -> None:
        self._wide = wide
        self._mixed = torch.zeros_like(queries, dtype=wide)  # by weights exp(score - highest)
        self._total = self._mixed[..., 0].clone()  # (n, R): of those weights
        self._highest = torch.full_like(self._total, -math.inf)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """scores: (n, R, C) wide, -inf where a query must not look; given away.   values: (n, C, D)."""
        highest = torch.maximum(self._highest, scores.amax(dim=-1))
        # a query that has seen nothing yet: -inf less -inf would be no number
        finite = highest.masked_fill(highest == -math.inf, 0.0)
        weights = scores.sub_(finite[..., None]).exp_()
        shrunk = (self._highest - finite).exp_()
        self._total = self._total * shrunk + weights.sum(dim=-1)
        self._mixed = self._mixed * shrunk[..., None] + wide_product(weights, values, self._wide)
        self._highest = highest

    def mixed(self) -> Tensor:
        """(n, R, D) wide; zero for a query that saw no key."""
        return self._mixed / self._total.masked_fill(self._total == 0.0, 1.0)[..., None]

    def log_sum(self) -> Tensor:
        """(n, R) wide, log Σ exp(score); inf for a query that saw no key, so that its weights are zero."""
        return (self._highest + self._total.log()).masked_fill(self._total == 0.0, math.inf)


@dataclass(frozen=True)
class BlockGradients:
    """What one block of scores gives, all wide."""

    query: Tensor  # (n, R, D), before the scale of the scores
    key: Tensor  # (n, C, D), likewise
    value: Tensor  # (n, C, D)
    scores: Tensor  # (n, R, C)


@dataclass(frozen=True)
class Answer:
    """The result of some queries, and the gradient that came back for it."""

    gradient: Tensor  # (n, R, D)
    share: Tensor  # (n, R) wide: Σ gradient · result, which each score's gradient is measured from
    log_sum: Tensor  # (n, R) wide, over all blocks


def block_gradients(scores: Tensor, answer: Answer, query: Tensor, key: Tensor, value: Tensor) -> BlockGradients:
    """Scores (n, R, C) wide, given away, of queries (n, R, D) and keys (n, C, D): their part of all gradients."""
    wide = scores.dtype
    weights = scores.sub_(answer.log_sum[..., None]).exp_()
    of_values = wide_product(weights.transpose(1, 2), answer.gradient, wide)
    of_scores = wide_product(answer.gradient, value.transpose(1, 2), wide).sub_(answer.share[..., None]).mul_(weights)
    return BlockGradients(
        query=wide_product(of_scores, key, wide),
        key=wide_product(of_scores.transpose(1, 2), query, wide),
        value=of_values,
        scores=of_scores,
    )
