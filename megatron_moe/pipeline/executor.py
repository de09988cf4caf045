"""Plays any schedule: the one place that moves tensors between stages and starts backward passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.pipeline.actions import Action, Entry, Kind, flat
from megatron_moe.pipeline.transfer import Crossing, Edge, Transfer


@dataclass(frozen=True)
class Played:
    """One forward pass of one microbatch through one stage."""

    outputs: dict[str, Tensor]  # for the next stage; empty from the last one
    losses: list[Tensor]  # () each, scaled: the stage's own part of the objective
    run_weight_gradients: Callable[[], None]  # the second half of a split backward pass


class Program(Protocol):
    """What a stage does; knows models and batches, of which the executor knows nothing."""

    def edge(self, stage: int, microbatch: int) -> Edge:
        """What stage - 1 hands to this stage."""

    def forward(self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool) -> Played:
        """split: weight gradients wait for run_weight_gradients."""


@dataclass(frozen=True)
class _Held:
    inputs: dict[str, Tensor]
    played: Played


class Executor:
    """Plays this rank's actions. `complete(stage)` is called when the gradients of a stage are whole."""

    def __init__(
        self, num_stages: int, transfer: Transfer, complete: Callable[[int], None] = lambda stage: None
    ) -> None:
        self._num_stages = num_stages
        self._transfer = transfer
        self._complete = complete

    def train(self, entries: Sequence[Entry], program: Program) -> None:
        """Forward and backward passes of one step."""
        actions = flat(entries)
        held: dict[tuple[int, int], _Held] = {}
        split = any(action.kind is Kind.BACKWARD_WEIGHT for action in actions)
        last = {action.stage: action for action in actions}
        for action in actions:
            self._play(action, program, held, split)
            if last[action.stage] is action:
                self._complete(action.stage)
        self._transfer.finish()

    def evaluate(self, entries: Sequence[Entry], program: Program) -> None:
        """Forward passes only."""
        with torch.no_grad():
            for action in flat(entries):
                inputs = self._inputs(action, program)
                self._pass_on(action, program, program.forward(action.stage, action.microbatch, inputs, split=False))
        self._transfer.finish()

    def _play(self, action: Action, program: Program, held: dict[tuple[int, int], _Held], split: bool) -> None:
        key = (action.stage, action.microbatch)
        if action.kind is Kind.FORWARD:
            inputs = self._inputs(action, program)
            for tensor in inputs.values():
                tensor.requires_grad_()
            played = program.forward(action.stage, action.microbatch, inputs, split=split)
            held[key] = _Held(inputs, played)
            self._pass_on(action, program, played)
            return
        if action.kind is Kind.BACKWARD_WEIGHT:
            held.pop(key).played.run_weight_gradients()
            return
        self._backward(action, program, held[key])
        if action.kind is Kind.BACKWARD:
            held.pop(key).played.run_weight_gradients()

    def _inputs(self, action: Action, program: Program) -> dict[str, Tensor]:
        if action.stage == 0:
            return {}
        return self._transfer.receive_forward(*_arrival(action, program))

    def _pass_on(self, action: Action, program: Program, played: Played) -> None:
        if action.stage + 1 < self._num_stages:
            self._transfer.send_forward(played.outputs, *_departure(action, program))

    def _backward(self, action: Action, program: Program, held: _Held) -> None:
        roots: list[Tensor] = list(held.played.losses)
        gradients: list[Tensor | None] = [None] * len(roots)
        if action.stage + 1 < self._num_stages:
            received = self._transfer.receive_backward(*_departure(action, program))
            for name, gradient in received.items():
                roots.append(held.played.outputs[name])
                gradients.append(gradient)
        torch.autograd.backward(roots, gradients)
        if action.stage:
            found = {name: _gradient(tensor) for name, tensor in held.inputs.items()}
            self._transfer.send_backward(found, *_arrival(action, program))


def _arrival(action: Action, program: Program) -> tuple[Edge, Crossing]:
    """Where the action's microbatch comes into its stage."""
    return program.edge(action.stage, action.microbatch), Crossing(action.stage, action.microbatch)


def _departure(action: Action, program: Program) -> tuple[Edge, Crossing]:
    """Where it goes on to the next one."""
    return program.edge(action.stage + 1, action.microbatch), Crossing(action.stage + 1, action.microbatch)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
