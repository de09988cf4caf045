"""A toy program in stages, one or several on each rank, against the same function in one piece."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.config.pipeline import FOR_ROUNDS
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.actions import Kind, Pair, Pipeline, flat
from megatron_moe.pipeline.executor import Executor, Played
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.pipeline.transfer import Crossing, Edge, Transfer

CPU = torch.device("cpu")
MICROBATCHES, WIDTH = 5, 4


def weights(stages: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=random) for _ in range(stages)]


def batch(microbatch: int) -> Tensor:
    """Microbatches of different lengths, as decoding and packing may bring."""
    return torch.randn(
        2 + microbatch % 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(microbatch)
    )


def step(
    stage: int, weight: Tensor, inputs: Mapping[str, Tensor], microbatch: int, stages: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs and the loss of one stage. The first input goes along to the last stage; `unused` is never read, and
    `same` goes through every stage untouched."""
    first = inputs["first"] if stage else batch(microbatch)
    hidden = torch.tanh((inputs["hidden"] if stage else first) @ weight)
    own_loss = hidden.square().mean() * (stage + 1)
    same = inputs["same"] if stage else first * weight.mean()
    if stage + 1 == stages:
        own_loss = own_loss + (hidden * first).sum() + same.square().sum()
    return {"hidden": hidden, "first": first * weight.sum(), "unused": hidden[:1], "same": same}, own_loss


def whole(stages: int) -> tuple[list[Tensor], list[float]]:
    """Gradients of all weights and the losses of each stage, summed over the microbatches, without a pipeline."""
    parts = [weight.requires_grad_() for weight in weights(stages)]
    losses: list[list[Tensor]] = [[] for _ in parts]
    for microbatch in range(MICROBATCHES):
        tensors: dict[str, Tensor] = {}
        for stage, weight in enumerate(parts):
            tensors, loss = step(stage, weight, tensors, microbatch, stages)
            losses[stage].append(loss)
    torch.stack([loss for stage in losses for loss in stage]).sum().backward()
    gradients = [weight.grad for weight in parts if weight.grad is not None]
    return gradients, [float(torch.stack(stage).sum().detach()) for stage in losses]


class Toy:
    """One rank's stages; their weight gradients wait when the backward pass is split."""

    def __init__(self, own: Sequence[int], stages: int) -> None:
        self.stages = stages
        self.weight = {stage: weights(stages)[stage] for stage in own}
        self.gradient = {stage: torch.zeros_like(weight) for stage, weight in self.weight.items()}
        self.loss = dict.fromkeys(own, 0.0)
        self.calls: list[str] = []
        self.last: list[str] = []  # weight gradients that were said to be a stage's last

    def edge(self, stage: int, microbatch: int) -> Edge:
        shape = tuple(batch(microbatch).shape)
        return {
            "hidden": (shape, torch.float64),
            "first": (shape, torch.float64),
            "unused": ((1, WIDTH), torch.float64),
            "same": (shape, torch.float64),
        }

    def forward(
        self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool, last: bool = False
    ) -> Played:
        weight = self.weight[stage].clone().requires_grad_(torch.is_grad_enabled())
        outputs, loss = step(stage, weight, inputs, microbatch, self.stages)
        self.loss[stage] += float(loss.detach())
        self.calls.append(f"F{stage}.{microbatch}{'s' if split else ''}")
        self.last += [f"W{stage}.{microbatch}"] * last

        def run_weight_gradients() -> None:
            assert weight.grad is not None
            self.gradient[stage] += weight.grad
            self.calls.append(f"W{stage}.{microbatch}")

        return Played({} if stage + 1 == self.stages else outputs, [loss], run_weight_gradients)


def play(rank: int, world_size: int, name: str, rounds: int) -> dict[str, Any]:
    shape = Pipeline(world_size, MICROBATCHES, rounds)
    grid = Grid(world_size, pp=world_size, rounds=rounds)
    state = ParallelState.alone() if world_size == 1 else ParallelState.distributed(grid)
    toy = Toy(shape.stages_of(rank), shape.stages)
    completed: list[tuple[int, list[str]]] = []
    executor = Executor(
        shape.stages,
        Transfer(state, CPU),
        complete=lambda stage: completed.append((stage, list(toy.calls))),
    )
    executor.train(SCHEDULES[name](shape)[rank], toy)
    training_loss, toy.loss = toy.loss, dict.fromkeys(toy.loss, 0.0)
    number = len(toy.calls)
    executor.evaluate(forward_only(shape)[rank], toy)
    return {
        "gradient": {stage: gradient.tolist() for stage, gradient in toy.gradient.items()},
        "loss": training_loss,
        "evaluated": toy.loss,
        "calls": toy.calls[:number],
        "completed": completed,
        "last": toy.last,
    }


PLAYED = [(name, 3, 1) for name in SCHEDULES] + [
    (name, ranks, rounds) for name in FOR_ROUNDS for ranks, rounds in ((1, 4), (2, 2), (2, 3), (3, 2))
]


@pytest.mark.parametrize(("name", "ranks", "rounds"), PLAYED)
def test_stages_equal_the_function_in_one_piece(name: str, ranks: int, rounds: int) -> None:
    shape = Pipeline(ranks, MICROBATCHES, rounds)
    gradients, losses = whole(shape.stages)
    for rank, found in enumerate(run_on_ranks(ranks, play, name, rounds)):
        actions = flat(SCHEDULES[name](shape)[rank])
        for stage in shape.stages_of(rank):
            gradient = torch.tensor(found["gradient"][stage], dtype=torch.float64)
            torch.testing.assert_close(gradient, gradients[stage], rtol=1e-12, atol=1e-12)
            assert found["loss"][stage] == pytest.approx(losses[stage], rel=1e-12)
            assert found["evaluated"][stage] == pytest.approx(losses[stage], rel=1e-12)
        # what was played is what the schedule says
        paired = any(isinstance(entry, Pair) for entry in SCHEDULES[name](shape)[rank])
        split = "s" if paired or any(action.kind is Kind.BACKWARD_WEIGHT for action in actions) else ""
        order = [
            f"F{action.stage}.{action.microbatch}{split}"
            if action.kind is Kind.FORWARD
            else f"W{action.stage}.{action.microbatch}"
            for action in actions
            if action.kind is not Kind.BACKWARD_INPUT
        ]
        if paired:
            # weight gradients wait until a pass could use something to do, or until the next is over
            for kind in "FW":
                played, wanted = ([call for call in calls if call[0] == kind] for calls in (found["calls"], order))
                assert played == wanted
        else:
            assert found["calls"] == order
        last = {call[1:].partition(".")[0]: call for call in order if call[0] == "W"}
        assert sorted(found["last"]) == sorted(last.values())
        # gradients of a stage are called whole once, after the last of them
        ends = sorted(
            max(place for place, call in enumerate(order) if call[1:].startswith(f"{stage}."))
            for stage in shape.stages_of(rank)
        )
        assert [(stage, len(calls)) for stage, calls in found["completed"]] == [
            (int(order[end][1:].partition(".")[0]), end + 1) for end in ends
        ]


def test_a_rank_alone_hands_on_without_a_copy() -> None:
    transfer = Transfer(ParallelState.alone(), CPU)
    hidden = torch.ones(2, requires_grad=True) * 3.0
    edge = {"hidden": ((2,), torch.float32)}
    for number, tensor in enumerate((hidden, 2.0 * hidden)):
        transfer.send_forward({"hidden": tensor}, edge, Crossing(1, number))
    # whoever asks first: microbatches are told apart by their numbers
    assert transfer.receive_forward(edge, Crossing(1, 1))["hidden"].tolist() == [6.0, 6.0]
    received = transfer.receive_forward(edge, Crossing(1, 0))["hidden"]
    assert received.data_ptr() == hidden.data_ptr() and not received.requires_grad


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_stage_needs_nobody(name: str) -> None:
    toy = Toy([0], 1)
    Executor(1, Transfer(ParallelState.alone(), CPU)).train(SCHEDULES[name](Pipeline(1, MICROBATCHES))[0], toy)
    (wanted,), _ = whole(1)
    torch.testing.assert_close(toy.gradient[0], wanted)


def send_something_else(rank: int, world_size: int, dtype: torch.dtype) -> None:
    state = ParallelState.distributed(Grid(world_size, pp=world_size))
    if rank == 0:
        transfer = Transfer(state, CPU)
        edge = {"hidden": ((2,), torch.float32)}
        transfer.send_forward({"hidden": torch.zeros(3, dtype=dtype)}, edge, Crossing(1, 0))


def test_a_tensor_that_its_edge_does_not_declare_is_refused() -> None:
    with pytest.raises(Exception, match=r"hidden is \(3,\) torch.float32; the edge declares \(2,\) torch.float32"):
        run_on_ranks(2, send_something_else, torch.float32)
