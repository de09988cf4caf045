"""The idle share that four ranks show when each pass sleeps, so that cores do not matter, against the formula."""

import time
from collections.abc import Callable
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
# the first try is near enough, unless the machine does other things too; what those take does not grow with the sleep
PACES = [1.3**number for number in range(8)]
PLAYED = [(name, Pipeline(RANKS, 4, rounds=2 if name == "interleaved" else 1)) for name in SCHEDULES]


class Sleep(torch.autograd.Function):
    """Its backward pass does what it is told."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, backward: Callable[[], None]) -> Tensor:
        ctx.call = backward
        return hidden + 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.call()
        return gradient, None


class Sleeper:
    """A program of any stages whose passes sleep instead of computing.

    pace: 0 = no sleep at all.   halves: the second half of a backward pass sleeps when it is its turn.
    """

    def __init__(self, stages: int, *, pace: float, halves: bool) -> None:
        self.stages = stages
        self.pace = pace
        self.halves = halves
        self.slept = 0.0

    def edge(self, stage: int, microbatch: int) -> Edge:
        return {"hidden": ((1,), torch.float32)}

    def sleep(self, seconds: float) -> None:
        start = time.monotonic()
        time.sleep(self.pace * seconds)
        self.slept += time.monotonic() - start

    def forward(
        self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool, last: bool = False
    ) -> Played:
        self.sleep(SLEEPS.forward)
        now = SLEEPS.backward_input if self.halves else SLEEPS.backward
        start = inputs["hidden"] if stage else torch.zeros(1, requires_grad=True)
        hidden = Sleep.apply(start, lambda: self.sleep(now))

        def run_weight_gradients() -> None:
            if self.halves:
                self.sleep(SLEEPS.backward_weight)

        at_end = stage + 1 == self.stages
        return Played({} if at_end else {"hidden": hidden}, [hidden.sum()] if at_end else [], run_weight_gradients)


def together(value: float, operation: Any) -> float:
    """One number of all ranks'."""
    whole = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(whole, operation)
    return float(whole)


def idle_shares(rank: int, world_size: int, name: str, shape: Pipeline) -> list[float]:
    """Of each try, from when all ranks start until the last one is done; the last try is near enough to the formula."""
    state = ParallelState.distributed(Grid(world_size, pp=world_size, rounds=shape.rounds))
    executor = Executor(shape.stages, Transfer(state, CPU))
    entries = SCHEDULES[name](shape)[rank]
    halves = any(action.kind is Kind.BACKWARD_WEIGHT for action in flat(entries))
    most = SCHEDULES[name].idle_share(shape, SLEEPS) + TOLERANCE
    # ranks find each other at the first message
    executor.train(entries, Sleeper(shape.stages, pace=0.0, halves=halves))
    found: list[float] = []
    for pace in PACES:
        program = Sleeper(shape.stages, pace=pace, halves=halves)
        # the clock is one for all processes of a machine
        start = together(time.monotonic(), dist.ReduceOp.MAX) + 0.02
        time.sleep(max(0.0, start - time.monotonic()))
        executor.train(entries, program)
        seconds = together(time.monotonic(), dist.ReduceOp.MAX) - start
        found.append(1 - together(program.slept, dist.ReduceOp.SUM) / (world_size * seconds))
        if found[-1] < most:
            break
    return found


@pytest.mark.parametrize(("name", "shape"), PLAYED, ids=str)
def test_ranks_that_sleep_are_idle_as_long_as_the_formula_says(name: str, shape: Pipeline) -> None:
    shares = run_on_ranks(RANKS, idle_shares, name, shape)[0]
    formula = SCHEDULES[name].idle_share(shape, SLEEPS)
    assert shares[-1] == pytest.approx(formula, abs=TOLERANCE), shares
