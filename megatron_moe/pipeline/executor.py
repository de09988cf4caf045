"""Plays any schedule: the one place that moves tensors between stages and starts backward passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.parallel.turns import Filler, Turns, no_filler
from megatron_moe.pipeline.actions import Action, Entry, Kind, Pair, flat
from megatron_moe.pipeline.transfer import Crossing, Edge, Transfer


@dataclass(frozen=True)
class Played:
    """One forward pass of one microbatch through one stage."""

    outputs: dict[str, Tensor]  # for the next stage; empty from the last one
    losses: list[Tensor]  # () each, scaled: the stage's own part of the objective
    run_weight_gradients: Callable[[], None]  # the second half of a split backward pass
    run_one_weight_gradient: Filler = no_filler  # a piece of it, as far as the first half has come


class Program(Protocol):
    """What a stage does; knows models and batches, of which the executor knows nothing."""

    def edge(self, stage: int, microbatch: int) -> Edge:
        """What stage - 1 hands to this stage."""

    def forward(
        self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool, last: bool = False
    ) -> Played:
        """split: weight gradients wait for run_weight_gradients.   last: of this stage's microbatches, this one is the
        last to have its gradients computed."""


@dataclass(frozen=True)
class _Held:
    inputs: dict[str, Tensor]
    played: Played


class _Step:
    """One step under way: what its microbatches have left for later."""

    def __init__(self, entries: Sequence[Entry], program: Program) -> None:
        actions = flat(entries)
        self.program = program
        self.held: dict[tuple[int, int], _Held] = {}
        self.paired = any(isinstance(entry, Pair) for entry in entries)
        self.split = self.paired or any(action.kind is Kind.BACKWARD_WEIGHT for action in actions)
        self.unfinished: Played | None = None  # its weight gradients fill the waits of the next passes
        self.last = {action.stage: action for action in actions}

    def forward(self, action: Action, inputs: dict[str, Tensor]) -> Played:
        for tensor in inputs.values():
            tensor.requires_grad_()
        last = self.last[action.stage].microbatch == action.microbatch
        played = self.program.forward(action.stage, action.microbatch, inputs, split=self.split, last=last)
        self.held[action.stage, action.microbatch] = _Held(inputs, played)
        return played

    def filler_beside(self, played: Played) -> Filler:
        """A piece of the unfinished weight gradients, then one of `played`, whose backward pass is under way."""
        before = self.unfinished
        if before is None:
            return played.run_one_weight_gradient
        return lambda: before.run_one_weight_gradient() or played.run_one_weight_gradient()

    def finish(self, following: Played | None = None) -> None:
        """All weight gradients that are unfinished; those of `following` are from now on."""
        if self.unfinished is not None:
            self.unfinished.run_weight_gradients()
        self.unfinished = following


class Executor:
    """Plays this rank's actions. `complete(stage)` is called when the gradients of a stage are whole.

    turns: how the two passes of a pair take turns.
    """

    def __init__(
        self,
        num_stages: int,
        transfer: Transfer,
        complete: Callable[[int], None] = lambda stage: None,
        turns: Turns | None = None,
    ) -> None:
        self._num_stages = num_stages
        self._transfer = transfer
        self._complete = complete
        self._turns = turns or Turns(torch.device("cpu"))

    def train(self, entries: Sequence[Entry], program: Program) -> None:
        """Forward and backward passes of one step."""
        step = _Step(entries, program)
        for entry in entries:
            if isinstance(entry, Pair):
                self._play_pair(entry, step)
            else:
                self._play(entry, step)
            for action in entry.parts:
                if step.last[action.stage] is action:
                    step.finish()
                    self._complete(action.stage)
        self._transfer.finish()

    def evaluate(self, entries: Sequence[Entry], program: Program) -> None:
        """Forward passes only."""
        with torch.no_grad():
            for action in flat(entries):
                inputs = self._inputs(action, program)
                self._pass_on(action, program, program.forward(action.stage, action.microbatch, inputs, split=False))
        self._transfer.finish()

    def _play(self, action: Action, step: _Step) -> None:
        key = (action.stage, action.microbatch)
        if action.kind is Kind.FORWARD:
            self._pass_on(action, step.program, step.forward(action, self._inputs(action, step.program)))
            return
        if action.kind is Kind.BACKWARD_WEIGHT:
            step.held.pop(key).played.run_weight_gradients()
            return
        gradients, held = self._gradients(action, step.program), step.held[key]
        if step.paired:
            filler = step.filler_beside(held.played)
            self._turns.alone(lambda: self._backward(held, gradients), filler=filler)
        else:
            self._backward(held, gradients)
        self._pass_back(action, step.program, held)
        if action.kind is Kind.BACKWARD:
            del step.held[key]
            step.finish(held.played)
            if not step.paired:
                step.finish()

    def _play_pair(self, pair: Pair, step: _Step) -> None:
        """Both passes at once. Weight gradients, for which nobody waits, are computed where both passes would wait."""
        inputs = self._inputs(pair.forward, step.program)
        gradients = self._gradients(pair.backward, step.program)
        held = step.held.pop((pair.backward.stage, pair.backward.microbatch))
        played: list[Played] = []
        self._turns.together(
            lambda: played.append(step.forward(pair.forward, inputs)),
            lambda: self._backward(held, gradients),
            filler=step.filler_beside(held.played),
        )
        self._pass_on(pair.forward, step.program, played[0])
        self._pass_back(pair.backward, step.program, held)
        step.finish(held.played)

    def _inputs(self, action: Action, program: Program) -> dict[str, Tensor]:
        if action.stage == 0:
            return {}
        return self._transfer.receive_forward(*_arrival(action, program))

    def _pass_on(self, action: Action, program: Program, played: Played) -> None:
        if action.stage + 1 < self._num_stages:
            self._transfer.send_forward(played.outputs, *_departure(action, program))

    def _gradients(self, action: Action, program: Program) -> dict[str, Tensor]:
        """Of what the stage passed on."""
        if action.stage + 1 == self._num_stages:
            return {}
        return self._transfer.receive_backward(*_departure(action, program))

    def _backward(self, held: _Held, gradients: dict[str, Tensor]) -> None:
        roots = [*held.played.losses, *(held.played.outputs[name] for name in gradients)]
        torch.autograd.backward(roots, [*(None for _ in held.played.losses), *gradients.values()])

    def _pass_back(self, action: Action, program: Program, held: _Held) -> None:
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
