"""A whole model on one process, in one call: for comparisons and small experiments."""

import torch
from torch import Tensor

from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.layers.context_parallel import context_rows
from megatron_moe.models.gpt import GPTStage
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.parallel.random import KeyedRandom


def plain_context(tokens: Tensor, seed: int = 0) -> ForwardContext:
    """An evaluation pass over tokens (B, S): one document in each sample, no padding."""
    samples, length = tokens.shape
    view = SequenceView(
        tokens=tokens.t(),
        positions=torch.arange(length, device=tokens.device)[:, None].expand(length, samples),
        segments=torch.zeros(length, samples, dtype=torch.int32, device=tokens.device),
        sample_ids=torch.arange(samples, device=tokens.device),
        rows=context_rows(length, 1, 0, tokens.device),
        segmented=False,
    )
    return ForwardContext(view=view, random=KeyedRandom(seed), train=False, sequence_parallel=False)


@torch.no_grad()
def whole_logits(stage: GPTStage, tokens: Tensor) -> tuple[Tensor, list[RoutingReport]]:
    """Logits (B, S, V) without the vocabulary's padding, of a model whose layers are all in one stage, and its reports.

    tokens: (B, S) int64.
    """
    output = stage({}, plain_context(tokens))
    return output.tensors["logits"][..., : stage.spec.vocab_size].transpose(0, 1), output.reports
