"""Forward passes for the tests of this room."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.layers.context_parallel import context_rows
from megatron_moe.layers.weight_gradients import WeightGradients
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState

CPU = torch.device("cpu")
M = TypeVar("M", bound=nn.Module)


def context(
    length: int,
    samples: int,
    state: ParallelState,
    *,
    segments: Tensor | None = None,
    positions: Tensor | None = None,
    sequence_parallel: bool = False,
    sink: WeightGradients | None = None,
) -> ForwardContext:
    """segments, positions: (S, B)."""
    plain = torch.arange(length)[:, None].expand(length, samples)
    view = SequenceView(
        tokens=torch.arange(length * samples).view(length, samples) % 11,
        positions=plain if positions is None else positions,
        segments=torch.zeros(length, samples, dtype=torch.int32) if segments is None else segments,
        sample_ids=torch.arange(samples),
        rows=context_rows(length, state.cp.size, state.cp.rank, CPU),
        segmented=segments is not None,
    )
    return ForwardContext(view, KeyedRandom(0), train=True, sequence_parallel=sequence_parallel, weight_gradients=sink)


def wide_sum(parameter: Tensor) -> Tensor:
    """What products have added to the parameter's gradient."""
    total: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return total


def make(module: M, state: ParallelState, seed: int = 1) -> M:
    """The module in memory, with room for wide gradients."""
    materialise(module, state, seed, CPU)
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    return module
