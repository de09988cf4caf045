"""How far apart runs of one process are that differ in the order of their sums alone: what rounding is worth.

In float64 a tolerance of 1e-9 leaves rounding far behind. In float32 or bf16 it does not, and which figure it disturbs
how much depends on the model: a router that decides otherwise on a near tie moves every gradient behind it. So the
tolerance of a narrow type is measured. One process makes the same three steps over and over,

- with the samples of each global batch in another order, and in microbatches of another size: gradients and losses add
  up in another order, and with other partners;
- with the inner dimension of every matrix product cut in parts whose answers are rounded to the model's type and added,
  the last part first: what tensor parallelism does to products, and context and data parallelism to weight gradients.

All of it is the same mathematics. The spread of a figure is the largest difference between any two of these runs, and
the tolerance is twice that, at least a few roundings of the wide type. Experts are not put in another order: their
products are separate, and what two of them answer to one token is the same sum either way.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe.certify.tiny_model import GLOBAL_BATCH
from megatron_moe.certify.tiny_run import Outcome, RankOutcome, Where, train_tiny, worst_difference
from megatron_moe.config.run import RunConfig
from megatron_moe.models.build import DTYPES
from megatron_moe.parallel.state import ParallelState

aten = torch.ops.aten


@dataclass(frozen=True)
class Way:
    """One order of all sums.   order: of the samples of a global batch.   parts: of every product's inner dimension."""

    micro_batch_size: int
    order: tuple[int, ...]
    parts: int = 1


class CutProducts(TorchDispatchMode):
    """Inside, each matrix product is the sum of so many, each of them rounded to its type."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self._parts = parts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in (aten.mm.default, aten.bmm.default):
            return self._product(*args)
        if func is aten.mm.out:
            return named["out"].copy_(self._product(*args))
        plain = not named and len(args) == 3
        if func is aten.addmm.default and plain:
            return args[0] + self._product(*args[1:])
        if func is aten.addmm_.default and plain:
            return args[0].add_(self._product(*args[1:]))
        return func(*args, **named)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """(..., M, K) times (..., K, N)."""
        pairs = zip(left.tensor_split(self._parts, dim=-1), right.tensor_split(self._parts, dim=-2), strict=True)
        found = [one @ other for one, other in pairs if one.shape[-1]]
        if not found:
            return left @ right
        total = found[-1]
        for part in reversed(found[:-1]):
            total = total + part
        return total


def ways(group_samples: int) -> list[Way]:
    """The first is the plain one; samples of a routing group stay together."""
    places = [tuple(range(at, at + group_samples)) for at in range(0, GLOBAL_BATCH, group_samples)]
    plain, backwards, turned = (
        tuple(itertools.chain(*groups)) for groups in (places, places[::-1], places[1:] + places[:1])
    )
    sizes = [size for size in (1, 2, 4) if size % group_samples == 0]
    first = sizes[0]
    return [
        *(Way(size, plain) for size in sizes),
        *(Way(sizes[-1], order) for order in (backwards, turned)),
        Way(first, backwards),
        *(Way(first, plain, parts) for parts in (2, 3)),
        *(Way(sizes[-1], backwards, parts) for parts in (2, 4)),
    ]


def run_ways(rank: int, world_size: int, config: RunConfig, chosen: Sequence[Way], where: Where) -> list[RankOutcome]:
    """The run in each way, on one process."""
    found = []
    for way in chosen:
        training = replace(config.training, micro_batch_size=way.micro_batch_size)
        with CutProducts(way.parts):
            found.append(
                train_tiny(
                    replace(config, training=training), ParallelState.alone(), where.device_of(rank), way.order
                )
            )
    return found


def tolerances(outcomes: Sequence[Outcome], dtype: str) -> dict[str, float]:
    """Of each figure, from runs that should be equal."""
    wide = torch.promote_types(DTYPES[dtype], torch.float32)
    least = 8 * torch.finfo(wide).eps
    apart = [worst_difference(one, other) for one, other in itertools.permutations(outcomes, 2)]
    return {kind: max(least, 2.0 * max(errors[kind] for errors in apart)) for kind in apart[0]}
