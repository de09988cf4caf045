"""What is minimised: the mean loss per token of the global batch, and the auxiliary losses of the routers.

With stochastic experts (THOR, arXiv:2110.04260, section 3) each sample is seen twice, with other draws, and the two
predictions are held together: CE(p1) + CE(p2) + alpha · symmetric KL(p1, p2), all per target token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.layers.consistency import symmetric_divergence
from megatron_moe.layers.loss import vocabulary_cross_entropy
from megatron_moe.layers.recompute import run_again
from megatron_moe.moe.plan import AuxLoss
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class StreamCounts:
    """Of one stream, in every pass."""

    tokens: int  # not padding
    groups: int  # routing groups
    sequences: int  # samples


@dataclass(frozen=True)
class GlobalCounts:
    """What the losses of one step are divided by: counts over the whole global batch, known before any forward pass."""

    loss_tokens: float  # Σ loss_mask
    decoder: StreamCounts
    encoder: StreamCounts | None = None
    encoder_layers: int = 0  # layers before this one are the encoder's

    def aux_scale(self, loss: AuxLoss, layer: int) -> float | Tensor:
        """The factor of a router's share in the objective."""
        return loss.weight / self.number_of(loss.per, layer)

    def number_of(self, unit: str, layer: int) -> int:
        """Routing groups, samples or tokens of the global batch that pass a layer, at least 1.   unit: AuxLoss.per"""
        counts = self.encoder if self.encoder is not None and layer < self.encoder_layers else self.decoder
        return max(1, {"group": counts.groups, "sequence": counts.sequences, "token": counts.tokens}[unit])


@dataclass(frozen=True)
class Objective:
    """How often a sample is seen in a step, and what the passes add up to."""

    num_passes: int = 1
    cross_entropy_weight: float = 1.0  # of each pass
    consistency_weight: float = 0.0

    @classmethod
    def of(cls, moe: MoEConfig) -> "Objective":
        """Two passes where the configuration asks for consistency."""
        if moe.consistency_coeff is None:
            return cls()
        weight = 1.0 if moe.consistency_cross_entropy == "sum" else 0.5
        return cls(2, weight, moe.consistency_coeff)


@dataclass(frozen=True)
class TokenLosses:
    """Sums over the target tokens of this context-parallel rank, () wide, the same on all ranks of tp."""

    cross_entropy: Tensor  # mean over the passes
    consistency: Tensor | None  # None after a single pass

    def plus(self, other: "TokenLosses") -> "TokenLosses":
        """Those of both."""
        consistency = self.consistency
        if consistency is not None and other.consistency is not None:
            consistency = consistency + other.consistency
        return TokenLosses(self.cross_entropy + other.cross_entropy, consistency)

    def objective(self, rule: Objective) -> Tensor:
        """What is differentiated, still to be divided by the global batch's target tokens."""
        total = self.cross_entropy * (rule.cross_entropy_weight * rule.num_passes)
        return total if self.consistency is None else total + rule.consistency_weight * self.consistency


@dataclass(frozen=True)
class Targets:
    """What the rows of this context-parallel rank should have said, (R, B) each."""

    labels: Tensor  # int64
    mask: Tensor  # float32

    def rows(self, start: int, stop: int) -> "Targets":
        return Targets(self.labels[start:stop], self.mask[start:stop])


def token_losses(logits: Tensor, targets: Targets, vocab_size: int, tp: Axis, passes: int) -> TokenLosses:
    """logits: (R, passes · B, V/tp)."""
    losses = vocabulary_cross_entropy(logits, targets.labels.repeat(1, passes), vocab_size, tp)
    mask = targets.mask.to(losses.dtype)
    cross_entropy = (losses * mask.repeat(1, passes)).sum() / passes
    if passes == 1:
        return TokenLosses(cross_entropy, None)
    first, second = logits.chunk(2, dim=1)
    return TokenLosses(cross_entropy, (symmetric_divergence(first, second, vocab_size, tp) * mask).sum())


def chunked_losses(
    normed: Tensor, rows: int, losses_of: Callable[[Tensor, int, int], TokenLosses], *, train: bool
) -> TokenLosses:
    """The sum of losses_of(normed[start:stop], start, stop) over chunks of so many rows, of which nothing is kept."""
    found: TokenLosses | None = None
    for start in range(0, len(normed), rows):
        chunk = normed[start : start + rows]
        call = partial(run_again, losses_of) if train else losses_of
        new = call(chunk, start, start + len(chunk))
        found = new if found is None else found.plus(new)
    assert found is not None
    return found
