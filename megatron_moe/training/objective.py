"""What is minimised: the mean loss per token of the global batch, and the auxiliary losses of the routers."""

from dataclasses import dataclass

from torch import Tensor

from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.loss import vocabulary_cross_entropy
from megatron_moe.moe.plan import AuxLoss
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class GlobalCounts:
    """What the losses of one step are divided by: counts over the whole global batch, known before any forward pass."""

    loss_tokens: float  # Σ loss_mask
    tokens: int  # non-padding tokens
    groups: int  # routing groups

    def aux_scale(self, loss: AuxLoss) -> float:
        """The factor of a router's share in the objective."""
        return loss.weight / max(1, self.groups if loss.per == "group" else self.tokens)


def token_loss_share(
    logits: Tensor, labels: Tensor, loss_mask: Tensor, vocab_size: int, tp: Axis, ctx: ForwardContext
) -> Tensor:
    """Σ loss · mask over the tokens of this context-parallel rank, () wide, the same on all ranks of tp.

    logits: (S/cp, B, V/tp).   labels, loss_mask: (B, S), whole.
    """
    rows = ctx.view.rows
    losses = vocabulary_cross_entropy(logits, labels.t()[rows], vocab_size, tp)
    return (losses * loss_mask.t()[rows].to(losses.dtype)).sum()
