"""What is minimised: worked numbers of the two passes, what masked tokens may say, and what losses are divided by."""

import pytest
import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.layers.loss import vocabulary_cross_entropy
from megatron_moe.moe.plan import AuxLoss
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.objective import (
    GlobalCounts,
    Objective,
    StreamCounts,
    Targets,
    TokenLosses,
    chunked_losses,
    token_losses,
)

ALONE = ParallelState.alone()
VOCAB, LENGTH, SAMPLES = 5, 3, 2
LABELS = torch.tensor([[1, 4, 0], [2, 2, 3]])


@pytest.mark.parametrize(("reduction", "wanted"), [("sum", 2 * 3.0 + 5 * 0.25), ("mean", 3.0 + 5 * 0.25)])
def test_two_passes_add_up_with_the_divergence_by_its_weight(reduction: str, wanted: float) -> None:
    rule = Objective.of(MoEConfig(consistency_coeff=5.0, consistency_cross_entropy=reduction))
    found = TokenLosses(torch.tensor(3.0), torch.tensor(0.25)).objective(rule)
    assert (rule.num_passes, found.item()) == (2, wanted)
    assert TokenLosses(torch.tensor(3.0), None).objective(Objective.of(MoEConfig())).item() == 3.0


def asked(logits: Tensor, mask: Tensor) -> TokenLosses:
    """logits: (S, 2 B, V), of one pass after the other."""
    return token_losses(logits, Targets(LABELS.t(), mask.t()), VOCAB, ALONE.tp, 2)


def test_both_passes_are_measured_at_the_tokens_that_count() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(LENGTH, 2 * SAMPLES, VOCAB, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    found = asked(logits, mask)
    cross_entropy, divergence = 0.0, 0.0
    for sample, position in mask.nonzero().tolist():
        p, q = logits[position, sample].log_softmax(0), logits[position, SAMPLES + sample].log_softmax(0)
        cross_entropy -= float(p[LABELS[sample, position]] + q[LABELS[sample, position]]) / 2
        divergence += float(((p.exp() - q.exp()) * (p - q)).sum()) / 2
    assert found.cross_entropy.item() == pytest.approx(cross_entropy)
    assert found.consistency is not None and found.consistency.item() == pytest.approx(divergence)
    # a single pass has nothing to be held to
    once = token_losses(logits[:, :SAMPLES], Targets(LABELS.t(), mask.t()), VOCAB, ALONE.tp, 1)
    alone = vocabulary_cross_entropy(logits[:, :SAMPLES], LABELS.t(), VOCAB, ALONE.tp) * mask.t()
    assert once.consistency is None and once.cross_entropy.item() == pytest.approx(alone.sum().item())


@pytest.mark.parametrize(("rows", "passes"), [(1, 1), (3, 1), (2, 2), (99, 2)])
def test_chunks_of_rows_add_up_and_keep_nothing(rows: int, passes: int) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(LENGTH, passes * SAMPLES, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCAB, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = Targets(LABELS.t(), torch.ones(LENGTH, SAMPLES))
    calls = []

    def of_rows(normed: Tensor, start: int, stop: int) -> TokenLosses:
        calls.append(stop - start)
        return token_losses(normed @ weight.t(), targets.rows(start, stop), VOCAB, ALONE.tp, passes)

    rule = Objective(passes, 1.0, 0.5)
    whole = token_losses(hidden @ weight.t(), targets, VOCAB, ALONE.tp, passes).objective(rule)
    found = chunked_losses(hidden, rows, of_rows, train=True).objective(rule)
    wanted, gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (whole, found))
    torch.testing.assert_close(found, whole)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    # each chunk is computed again in the backward pass, and not larger than was allowed
    assert max(calls) <= rows and sum(calls) == 2 * LENGTH
    calls.clear()
    chunked_losses(hidden.detach(), rows, of_rows, train=False)
    assert sum(calls) == LENGTH


def test_a_share_is_divided_by_what_it_is_a_sum_over() -> None:
    counts = GlobalCounts(7.0, StreamCounts(tokens=30, groups=4, sequences=5), StreamCounts(20, 2, 3), encoder_layers=2)
    for layer, numbers in ((2, (30, 4, 5)), (1, (20, 2, 3))):
        found = [
            counts.aux_scale(AuxLoss(torch.zeros(()), 6.0, per=unit), layer) for unit in ("token", "group", "sequence")
        ]
        assert found == [6.0 / number for number in numbers]
    # a step of padding only
    assert GlobalCounts(0.0, StreamCounts(0, 1, 1)).number_of("token", 0) == 1
