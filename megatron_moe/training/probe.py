"""Where numbers stop being finite: watches one step that is played again, module by module.

Forward: the output of every module. Backward: the gradient of every such output. Beside them: weights, remembered
states, optimizer states and, at the end, reduced gradients, by their logical names.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.checkpoint.messages import gather_to_all
from megatron_moe.models.gpt import GPTStage
from megatron_moe.moe.experts import Experts
from megatron_moe.optim.owned import Gradients
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.executor import Played, Program
from megatron_moe.pipeline.transfer import Edge

# what comes first in a step is told first
STATE, FORWARD, BACKWARD, REDUCED = range(4)


@dataclass(frozen=True)
class Place:
    """Where a number was not finite. order: compared between ranks, phase first; the smallest comes first in a step."""

    order: tuple[int, ...]
    rank: int
    what: str  # "the output of", "the gradient of the output of", ...
    name: str  # of a module or a tensor
    layer: int | None
    experts: tuple[int, ...]  # global indices
    microbatch: int | None
    samples: tuple[int, ...]  # of the run

    def __str__(self) -> str:
        found = [f"{self.what} {self.name}"]
        found += [f"layer {self.layer}"] if self.layer is not None else []
        found += [f"expert {', '.join(map(str, self.experts))}"] if self.experts else []
        found += [f"rank {self.rank}"]
        found += [f"micro-batch {self.microbatch}"] if self.microbatch is not None else []
        found += [f"samples {', '.join(map(str, self.samples))}"] if self.samples else []
        return ", ".join(found)


class Probe:
    """Watches this rank in one step. Remembers the first place of each phase only.

    samples: ids of each microbatch of this rank.
    """

    def __init__(self, state: ParallelState, samples: Sequence[Sequence[int]], device: torch.device) -> None:
        self._state = state
        self._device = device
        self._samples = samples
        self._first: dict[int, Place] = {}
        self._microbatch = 0
        self._stage = 0
        self._fired = 0  # modules in this forward pass

    def look_at_state(self, blocks: Iterable[Block]) -> None:
        """Weights, remembered states and optimizer states, before the step."""
        for number, block in enumerate(blocks):
            self._tensor(STATE, number, block.name, block.tensor)

    def look_at_gradients(self, buckets: Gradients) -> None:
        """This rank's part of the sums, after the step."""
        number = 0
        for bucket in buckets.buckets:
            for part in bucket.segments:
                for block in part.blocks("", part.of(bucket.own_gradients), True, self._state):
                    number += 1
                    self._tensor(REDUCED, number, block.name, block.tensor)

    def _tensor(self, phase: int, number: int, name: str, tensor: Tensor) -> None:
        if phase not in self._first and _is_bad(tensor):
            what = "the summed gradient of" if phase == REDUCED else "the stored tensor"
            expert = re.search(r"experts\.(\d+)\.", name)
            experts = (int(expert.group(1)),) if expert else ()
            place = Place((phase, number), self._state.rank, what, name, _layer(name), experts, None, ())
            self._first[phase] = place

    @contextmanager
    def watching(self, stages: Sequence[GPTStage]) -> Iterator[None]:
        """Inside, every module of the stages tells what it returns."""
        hooks = [
            module.register_forward_hook(partial(self._returned, name or "the stage"))
            for stage in stages
            for name, module in stage.named_modules()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def enter(self, stage: int, microbatch: int) -> None:
        """What follows is this forward pass."""
        self._stage, self._microbatch, self._fired = stage, microbatch, 0

    def losses(self, losses: Sequence[Tensor]) -> None:
        """Those that the forward pass ends in."""
        self._fired += 1
        if any(_is_bad(loss) for loss in losses):
            self._note((FORWARD, self._microbatch, self._stage, self._fired), "the loss of", "the stage", ())

    def _returned(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._fired += 1
        microbatch, stage, fired = self._microbatch, self._stage, self._fired
        named = _experts_of(module, arguments)
        for tensor in _tensors(output):
            if _is_bad(tensor):
                self._note((FORWARD, microbatch, stage, fired), "the output of", name, named(tensor))
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, (BACKWARD, microbatch, -stage, -fired), name, named))

    def _gradient(
        self, order: tuple[int, ...], name: str, named: Callable[[Tensor], tuple[int, ...]], gradient: Tensor
    ) -> None:
        if _is_bad(gradient):
            self._note(order, "the gradient of the output of", name, named(gradient))

    def _note(self, order: tuple[int, ...], what: str, name: str, experts: tuple[int, ...]) -> None:
        phase, microbatch = order[:2]
        known = self._first.get(phase)
        if known is None or order < known.order:
            samples = tuple(self._samples[microbatch])
            place = Place(order, self._state.rank, what, name, _layer(name), experts, microbatch, samples)
            self._first[phase] = place

    def told(self) -> list[Place]:
        """The first places of the step over all ranks, those of several ranks together when they tie. Collective.

        To an expert come rows of all ranks of ep: their samples of the microbatch are named with it.
        """
        first = min(self._first.values(), key=lambda place: place.order, default=None)
        mine = {"place": None if first is None else asdict(first), "samples": [list(ids) for ids in self._samples]}
        answers = [json.loads(text) for text in gather_to_all(json.dumps(mine), self._state.world, self._device)]
        groups = [tuple(group) for group in json.loads(self._ep_groups())]
        places = [_read(answer["place"]) for answer in answers if answer["place"] is not None]
        earliest = min((place.order for place in places), default=None)
        return [_with_samples(place, answers, groups[place.rank]) for place in places if place.order == earliest]

    def _ep_groups(self) -> str:
        mine = json.dumps(self._state.ep.ranks)
        return f"[{', '.join(gather_to_all(mine, self._state.world, self._device))}]"


class Watched:
    """A program whose forward passes the probe follows."""

    def __init__(self, program: Program, probe: Probe) -> None:
        self._program = program
        self._probe = probe

    def edge(self, stage: int, microbatch: int) -> Edge:
        return self._program.edge(stage, microbatch)

    def forward(
        self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool, last: bool = False
    ) -> Played:
        self._probe.enter(stage, microbatch)
        played = self._program.forward(stage, microbatch, inputs, split=split, last=last)
        self._probe.losses(played.losses)
        return played


def _read(values: dict[str, Any]) -> Place:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Place(**{**values, **lists})


def _with_samples(place: Place, answers: list[dict[str, Any]], group: Sequence[int]) -> Place:
    if not place.experts or place.microbatch is None:
        return place
    ids = {sample for rank in group for sample in answers[rank]["samples"][place.microbatch]}
    return replace(place, samples=tuple(sorted(ids)))


def _experts_of(module: nn.Module, arguments: tuple[Any, ...]) -> Callable[[Tensor], tuple[int, ...]]:
    """Which experts, by global index, own rows that are not finite; () of anything but experts' rows."""
    if not isinstance(module, Experts):
        return lambda rows: ()
    counts: list[int] = list(arguments[1])
    first = module.ep.rank * len(counts)

    def named(rows: Tensor) -> tuple[int, ...]:
        parts = rows.detach().split(counts)
        return tuple(first + index for index, part in enumerate(parts) if _is_bad(part))

    return named


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in what a module returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))


def _is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.detach().isfinite().all())


def _layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)", name)
    return int(found.group(1)) if found else None
