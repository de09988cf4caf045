"""A toy program in three stages against the same function in one piece."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.actions import Kind, Pipeline, flat
from megatron_moe.pipeline.executor import Executor, Played
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.pipeline.transfer import Edge, Transfer

CPU = torch.device("cpu")
STAGES, MICROBATCHES, WIDTH = 3, 5, 4
SHAPE = Pipeline(STAGES, MICROBATCHES)


def weights() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=random) for _ in range(STAGES)]


def batch(microbatch: int) -> Tensor:
    """Microbatches of different lengths, as decoding and packing may bring."""
    return torch.randn(
        2 + microbatch % 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(microbatch)
    )


def step(stage: int, weight: Tensor, inputs: Mapping[str, Tensor], microbatch: int) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs and the loss of one stage. The first input goes along to the last stage; `unused` is never read."""
    first = inputs["first"] if stage else batch(microbatch)
    hidden = torch.tanh((inputs["hidden"] if stage else first) @ weight)
    own_loss = hidden.square().mean() * (stage + 1)
    if stage + 1 == STAGES:
        own_loss = own_loss + (hidden * first).sum()
    return {"hidden": hidden, "first": first * weight.sum(), "unused": hidden[:1]}, own_loss


def whole() -> tuple[list[Tensor], list[float]]:
    """Gradients of all weights and the losses of each stage, summed over the microbatches, without a pipeline."""
    parts = [weight.requires_grad_() for weight in weights()]
    losses: list[list[Tensor]] = [[] for _ in parts]
    for microbatch in range(MICROBATCHES):
        tensors: dict[str, Tensor] = {}
        for stage, weight in enumerate(parts):
            tensors, loss = step(stage, weight, tensors, microbatch)
            losses[stage].append(loss)
    torch.stack([loss for stage in losses for loss in stage]).sum().backward()
    gradients = [weight.grad for weight in parts if weight.grad is not None]
    return gradients, [float(torch.stack(stage).sum().detach()) for stage in losses]


class Toy:
    """One stage; its weight gradient waits when the backward pass is split."""

    def __init__(self, stage: int) -> None:
        self.weight = weights()[stage]
        self.gradient = torch.zeros_like(self.weight)
        self.loss = 0.0
        self.calls: list[str] = []

    def edge(self, stage: int, microbatch: int) -> Edge:
        shape = tuple(batch(microbatch).shape)
        return {
            "hidden": (shape, torch.float64),
            "first": (shape, torch.float64),
            "unused": ((1, WIDTH), torch.float64),
        }

    def forward(self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool) -> Played:
        weight = self.weight.clone().requires_grad_(torch.is_grad_enabled())
        outputs, loss = step(stage, weight, inputs, microbatch)
        self.loss += float(loss.detach())
        self.calls.append(f"F{microbatch}{'s' if split else ''}")

        def run_weight_gradients() -> None:
            assert weight.grad is not None
            self.gradient += weight.grad
            self.calls.append(f"W{microbatch}")

        return Played({} if stage + 1 == STAGES else outputs, [loss], run_weight_gradients)


def play(rank: int, world_size: int, name: str) -> dict[str, Any]:
    state = ParallelState.distributed(Grid(world_size, pp=world_size))
    toy = Toy(rank)
    completed: list[tuple[int, list[str]]] = []
    executor = Executor(
        STAGES,
        Transfer(state.pp, state.pp_back, CPU),
        complete=lambda stage: completed.append((stage, list(toy.calls))),
    )
    actions = SCHEDULES[name](SHAPE)[rank]
    executor.train(actions, toy)
    training_loss, toy.loss = toy.loss, 0.0
    executor.evaluate(forward_only(SHAPE)[rank], toy)
    return {
        "gradient": toy.gradient.tolist(),
        "loss": training_loss,
        "evaluated": toy.loss,
        "calls": toy.calls[: 2 * MICROBATCHES],
        "completed": completed,
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_three_stages_equal_the_function_in_one_piece(name: str) -> None:
    gradients, losses = whole()
    for stage, found in enumerate(run_on_ranks(STAGES, play, name)):
        torch.testing.assert_close(
            torch.tensor(found["gradient"], dtype=torch.float64), gradients[stage], rtol=1e-12, atol=1e-12
        )
        assert found["loss"] == pytest.approx(losses[stage], rel=1e-12)
        assert found["evaluated"] == pytest.approx(losses[stage], rel=1e-12)
        # gradients are called whole once, after the last of them
        assert found["completed"] == [(stage, found["calls"])]
        # what was played is what the schedule says
        split = "s" if any(action.kind is Kind.BACKWARD_WEIGHT for action in flat(SCHEDULES[name](SHAPE)[0])) else ""
        order = [
            f"F{action.microbatch}{split}" if action.kind is Kind.FORWARD else f"W{action.microbatch}"
            for action in flat(SCHEDULES[name](SHAPE)[stage])
            if action.kind is not Kind.BACKWARD_INPUT
        ]
        assert found["calls"] == order


def alone(toy: Toy) -> Executor:
    state = ParallelState.alone()
    return Executor(1, Transfer(state.pp, state.pp_back, CPU))


class OneStage(Toy):
    """The last stage only, fed with its own batch."""

    def forward(self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool) -> Played:
        played = super().forward(stage, microbatch, inputs, split=split)
        return Played({}, played.losses, played.run_weight_gradients)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_stage_needs_nobody(name: str) -> None:
    toy = OneStage(0)
    alone(toy).train(SCHEDULES[name](Pipeline(1, MICROBATCHES))[0], toy)
    weight = weights()[0].requires_grad_()
    torch.stack([step(0, weight, {}, microbatch)[1] for microbatch in range(MICROBATCHES)]).sum().backward()
    torch.testing.assert_close(toy.gradient, weight.grad)


def send_something_else(rank: int, world_size: int, dtype: torch.dtype) -> None:
    state = ParallelState.distributed(Grid(world_size, pp=world_size))
    if rank == 0:
        transfer = Transfer(state.pp, state.pp_back, CPU)
        transfer.send_forward({"hidden": torch.zeros(3, dtype=dtype)}, {"hidden": ((2,), torch.float32)})


def test_a_tensor_that_its_edge_does_not_declare_is_refused() -> None:
    with pytest.raises(Exception, match=r"hidden is \(3,\) torch.float32; the edge declares \(2,\) torch.float32"):
        run_on_ranks(2, send_something_else, torch.float32)
