"""The idle share that four ranks show when each pass sleeps, so that cores do not matter, against the formula."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.actions import Kind, Pipeline, flat
from megatron_moe.pipeline.executor import Executor, Played
from megatron_moe.pipeline.schedule import Costs
from megatron_moe.pipeline.schedules import SCHEDULES
from megatron_moe.pipeline.transfer import Edge, Transfer

CPU = torch.device("cpu")
RANKS = 4
SLEEPS = Costs(0.04, 0.04, 0.04, overlap=0)  # nothing travels between experts, so that a pair hides nothing
TOLERANCE = 0.03  # of the time of a step
TRIES = 20  # the first one is near enough, unless the machine does other things too
PLAYED = [(name, Pipeline(RANKS, 4, rounds=2 if name == "interleaved" else 1)) for name in SCHEDULES]


class Sleep(torch.autograd.Function):
    """Its backward pass sleeps for as long as it is told."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return hidden + 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return gradient, None


class Sleeper:
    """A program of any stages whose passes sleep instead of computing.

    pace: 0 = no sleep at all.   halves: the second half of a backward pass sleeps when it is its turn.
    """

    def __init__(self, stages: int, *, pace: float, halves: bool) -> None:
        self.stages = stages
        self.pace = pace
        self.halves = halves

    def edge(self, stage: int, microbatch: int) -> Edge:
        return {"hidden": ((1,), torch.float32)}

    def forward(
        self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool, last: bool = False
    ) -> Played:
        time.sleep(self.pace * SLEEPS.forward)
        now = self.pace * (SLEEPS.backward_input if self.halves else SLEEPS.backward)
        hidden = Sleep.apply(inputs["hidden"] if stage else torch.zeros(1, requires_grad=True), now)

        def run_weight_gradients() -> None:
            if self.halves:
                time.sleep(self.pace * SLEEPS.backward_weight)

        at_end = stage + 1 == self.stages
        return Played({} if at_end else {"hidden": hidden}, [hidden.sum()] if at_end else [], run_weight_gradients)


def together(value: float, operation: Any) -> float:
    """One number of all ranks'."""
    whole = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(whole, operation)
    return float(whole)


def idle_share(shape: Pipeline, name: str, seconds: float) -> float:
    return 1 - SCHEDULES[name].work(shape, SLEEPS) / (shape.ranks * seconds)


def seconds_of_a_step(rank: int, world_size: int, name: str, shape: Pipeline) -> list[float]:
    """Of each try, from when all ranks start until the last one is done; the last try is near enough to the formula."""
    state = ParallelState.distributed(Grid(world_size, pp=world_size, rounds=shape.rounds))
    executor = Executor(shape.stages, Transfer(state, CPU))
    entries = SCHEDULES[name](shape)[rank]
    halves = any(action.kind is Kind.BACKWARD_WEIGHT for action in flat(entries))
    most = SCHEDULES[name].idle_share(shape, SLEEPS) + TOLERANCE
    # ranks find each other at the first message
    executor.train(entries, Sleeper(shape.stages, pace=0.0, halves=halves))
    found: list[float] = []
    while len(found) < TRIES and not (found and idle_share(shape, name, found[-1]) < most):
        # the clock is one for all processes of a machine
        start = together(time.monotonic(), dist.ReduceOp.MAX) + 0.02
        time.sleep(max(0.0, start - time.monotonic()))
        executor.train(entries, Sleeper(shape.stages, pace=1.0, halves=halves))
        found.append(together(time.monotonic(), dist.ReduceOp.MAX) - start)
    return found


@pytest.mark.parametrize(("name", "shape"), PLAYED, ids=str)
def test_ranks_that_sleep_are_idle_as_long_as_the_formula_says(name: str, shape: Pipeline) -> None:
    tries = run_on_ranks(RANKS, seconds_of_a_step, name, shape)[0]
    shares = [idle_share(shape, name, seconds) for seconds in tries]
    formula = SCHEDULES[name].idle_share(shape, SLEEPS)
    # sleeping takes no less than it is told
    assert formula < min(shares) < formula + TOLERANCE, (formula, shares)
