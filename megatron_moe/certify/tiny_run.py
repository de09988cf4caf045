"""A few steps of the tiny model on whatever ranks there are, and the measure that compares two such runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_moe.certify.tiny_model import GLOBAL_BATCH, STEPS, VOCAB, pairs, samples
from megatron_moe.config.errors import ReplicaError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.sampler import Sampler
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import Groups, ParallelState
from megatron_moe.training.engine import Engine, grid_of

# float64 sums in another order: measured 2e-13 at worst where losses are not near zero; the promise is 1e-9
TOLERANCE = 1e-9

Tensors = dict[str, np.ndarray]
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]


@dataclass(frozen=True)
class Outcome:
    """What one run found; the same for every layout."""

    losses: list[float]
    aux_losses: list[dict[str, float]]
    norms: list[float]
    gradients: Tensors  # of the first step, clipped
    weights: Tensors  # after the last step


@dataclass(frozen=True)
class RankOutcome:
    """What one rank brings to an Outcome: plain values that travel by pipe."""

    losses: list[float]
    aux_losses: list[dict[str, float]]
    norms: list[float]
    gradients: Pieces
    weights: Pieces
    seconds: float = 0.0


@dataclass(frozen=True)
class Where:
    """What the ranks run on.

    backend: of torch.distributed; over gloo, ranks may share a card, and what they send goes through the host.
    """

    device: str = "cpu"
    backend: str = "gloo"

    def device_of(self, rank: int) -> torch.device:
        """Cards go round."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())

    @property
    def through_host(self) -> bool:
        return self.device == "cuda" and self.backend == "gloo"


CPU = Where()


def _pieces(blocks: Sequence[Block]) -> Pieces:
    return [
        (block.name, block.global_shape, block.offset, block.tensor.double().cpu().numpy().copy()) for block in blocks
    ]


def _gradient_blocks(engine: Engine) -> list[Block]:
    """What this rank owns of the reduced gradients."""
    return [
        block
        for bucket in engine.buckets.buckets
        for segment in bucket.segments
        for block in segment.blocks("", segment.of(bucket.own_gradients), True, engine.state)
    ]


def train_tiny(
    config: RunConfig, state: ParallelState, device: torch.device | None = None, order: Sequence[int] | None = None
) -> RankOutcome:
    """Three steps on this rank.   order: of the samples within each global batch; None: their own."""
    started = time.perf_counter()
    engine = Engine(config, state, device or torch.device("cpu"), VOCAB)
    gradients: Pieces = []
    update = engine.optimizer.step

    def step_and_look(rate: float) -> None:
        if not gradients:
            gradients.extend(_pieces(_gradient_blocks(engine)))
        update(rate)

    engine.optimizer.step = step_and_look  # type: ignore[method-assign, assignment]
    draw = pairs if config.model.encoder_num_layers else samples
    results = []
    for step in range(STEPS):
        sampler = Sampler(
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=state.dp.rank,
            dp_size=state.dp.size,
            consumed=step * GLOBAL_BATCH,
        )
        numbers = [_in_order(some, step * GLOBAL_BATCH, order) for some in sampler.microbatches()]
        results.append(engine.train_step(step, [draw(some) for some in numbers]))
    return RankOutcome(
        losses=[result.metrics.loss for result in results],
        aux_losses=[dict(result.metrics.aux_losses) for result in results],
        norms=[result.grad_norm for result in results],
        gradients=gradients,
        weights=_pieces(engine.weight_blocks()),
        seconds=time.perf_counter() - started,
    )


def _in_order(numbers: Sequence[int], first: int, order: Sequence[int] | None) -> Sequence[int]:
    """The samples that stand at these places of a global batch that begins with sample `first`."""
    return numbers if order is None else [first + order[number - first] for number in numbers]


def run_all(rank: int, world_size: int, configs: Sequence[RunConfig], where: Where = CPU) -> list[RankOutcome]:
    """Every configuration, one after another, on the ranks that are there; each process group is made once."""
    states: dict[Grid, ParallelState] = {}
    groups: Groups = {}
    found = []
    device = where.device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for config in configs:
        grid = grid_of(config, world_size)
        if grid not in states:
            states[grid] = ParallelState.distributed(grid, through_host=where.through_host, known=groups)
        found.append(train_tiny(config, states[grid], device))
    return found


def _assemble(parts: Sequence[Pieces]) -> Tensors:
    whole: Tensors = {}
    for name, shape, offset, values in (piece for part in parts for piece in part):
        target = whole.setdefault(name, np.full(shape, np.nan))
        target[tuple(slice(at, at + size) for at, size in zip(offset, values.shape, strict=True))] = values
    return whole


def outcome_of(ranks: Sequence[RankOutcome]) -> Outcome:
    """Put the ranks' parts together. Raises ReplicaError unless every rank found the same figures."""
    first = ranks[0]
    for number, other in enumerate(ranks):
        if (other.losses, other.norms, other.aux_losses) != (first.losses, first.norms, first.aux_losses):
            raise ReplicaError(
                f"rank {number} found losses {other.losses} and gradient norms {other.norms}, rank 0 {first.losses} "
                f"and {first.norms}, where all must know the same; run it again: what stays is an error of this code."
            )
    return Outcome(
        losses=first.losses,
        aux_losses=first.aux_losses,
        norms=first.norms,
        gradients=_assemble([rank.gradients for rank in ranks]),
        weights=_assemble([rank.weights for rank in ranks]),
    )


def alone(config: RunConfig) -> Outcome:
    """The run on one process: what every layout is held to."""
    return outcome_of([train_tiny(config, ParallelState.alone())])


def _tensor_error(found: Tensors, wanted: Tensors) -> float:
    """max|a-b| / (max|b| + 1e-3 x the largest tensor's max), the worst tensor; infinite if one is not whole."""
    if set(found) != set(wanted):
        return float("inf")
    largest = max(float(np.abs(value).max()) for value in wanted.values())
    errors = [
        float(np.abs(found[name] - value).max()) / (float(np.abs(value).max()) + 1e-3 * largest)
        for name, value in wanted.items()
    ]
    return float("inf") if any(np.isnan(errors)) else max(errors)


def worst_difference(found: Outcome, wanted: Outcome) -> dict[str, float]:
    """Relative differences by kind."""

    def relative(mine: Sequence[float], theirs: Sequence[float]) -> float:
        # of what is zero the difference itself
        return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(mine, theirs, strict=True))

    aux = [
        relative([step[name] for step in found.aux_losses], [step[name] for step in wanted.aux_losses])
        for name in wanted.aux_losses[0]
    ]
    return {
        "loss": relative(found.losses, wanted.losses),
        "auxiliary losses": max(aux, default=0.0),
        "gradient norm": relative(found.norms, wanted.norms),
        "gradients": _tensor_error(found.gradients, wanted.gradients),
        "weights": _tensor_error(found.weights, wanted.weights),
    }
