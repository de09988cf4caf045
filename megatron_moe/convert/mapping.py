"""A conversion as data: which part of which project tensor each Hugging Face tensor is.

A rule is written once for one layer and one expert, with {layer} and {expert} in its names, and applied to all:

    qkv (G, q+2, D, H) ──┬─ dim 1, 0 .. q    ── reshape ──> q_proj (G·q·D, H)
                         ├─ dim 1, q .. q+1  ── reshape ──> k_proj (G·D, H)
                         └─ dim 1, q+1 ..    ── reshape ──> v_proj (G·D, H)

Each part is a range along one dimension, reshaped, so both directions follow from it and are exact. What no part
covers is padding: left out on the way to Hugging Face, zero on the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from megatron_moe.convert.tensors import Shape, TensorSink, TensorSource, check_same_tensors, shapes_of


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor as the range start .. start + length along `dim` of a project tensor, reshaped."""

    theirs: str
    shape: Shape
    dim: int
    start: int
    length: int

    def take(self, ours: Tensor) -> Tensor:
        """Their tensor, cut out of ours; a view where the memory allows it."""
        return ours.narrow(self.dim, self.start, self.length).reshape(self.shape)

    def put(self, theirs: Tensor, ours: Tensor) -> None:
        """Copy their tensor into its place in ours."""
        place = ours.narrow(self.dim, self.start, self.length)
        place.copy_(theirs.reshape(place.shape))


@dataclass(frozen=True)
class Rule:
    """One project tensor and the Hugging Face tensors that it is made of."""

    ours: str
    shape: Shape
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        for part in self.parts:
            cut = (*self.shape[: part.dim], part.length, *self.shape[part.dim + 1 :])
            if prod(cut) != prod(part.shape) or part.start + part.length > self.shape[part.dim]:
                raise ValueError(f"{part.theirs} {part.shape} is no part of {self.ours} {self.shape}")

    def numbered(self, **numbers: int) -> Rule:
        """The rule of one layer, or of one expert in one layer."""
        parts = tuple(replace(part, theirs=part.theirs.format(**numbers)) for part in self.parts)
        return replace(self, ours=self.ours.format(**numbers), parts=parts)

    def our_dtype(self, source: TensorSource) -> torch.dtype:
        """The type that holds all its parts exactly, given where they come from."""
        return reduce(torch.promote_types, (source.dtype(part.theirs) for part in self.parts))


def whole(ours: str, shape: Shape, theirs: str, their_shape: Shape | None = None) -> Rule:
    """A rule for tensors that are the same but for their shape."""
    return Rule(ours, shape, (Part(theirs, their_shape or shape, 0, 0, shape[0]),))


def padded_rows(ours: str, shape: Shape, theirs: str, rows: int) -> Rule:
    """A rule for a tensor whose rows from `rows` on are padding."""
    return Rule(ours, shape, (Part(theirs, (rows, *shape[1:]), 0, 0, rows),))


def stacked(ours: str, shape: Shape, *theirs: str) -> Rule:
    """A rule for a tensor whose first dimension counts whole tensors of theirs."""
    return Rule(ours, shape, tuple(Part(name, shape[1:], 0, index, 1) for index, name in enumerate(theirs)))


@dataclass(frozen=True)
class Mapping:
    """All rules of a model, in the order of the model."""

    rules: tuple[Rule, ...]

    @property
    def our_shapes(self) -> dict[str, Shape]:
        """Shapes of the project's tensors."""
        return {rule.ours: rule.shape for rule in self.rules}

    @property
    def their_shapes(self) -> dict[str, Shape]:
        """Shapes of the Hugging Face tensors, in model order."""
        return {part.theirs: part.shape for rule in self.rules for part in rule.parts}

    def checked_our_tensors(self, source: TensorSource, *, where: str) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of what `to_ours` writes, in its order.

        CheckpointError if the source, called `where`, does not have exactly the tensors of the mapping.
        """
        check_same_tensors(where, shapes_of(source), self.their_shapes)
        rules = self._widest_first(source)
        return {rule.ours: (rule.shape, rule.our_dtype(source)) for rule in rules}

    def to_theirs(self, source: TensorSource, sink: TensorSink, *, dtype: torch.dtype, where: str) -> None:
        """Write every Hugging Face tensor, in `dtype`; each project tensor is read once, and gone before the next.

        where: what the source is called in the CheckpointError that comes, before anything is written, if the source
        does not have exactly the tensors of the mapping.
        """
        check_same_tensors(where, shapes_of(source), self.our_shapes)
        for rule in self.rules:
            _write_parts(rule, source.read(rule.ours), sink, dtype)

    def to_ours(self, source: TensorSource, sink: TensorSink, *, where: str) -> None:
        """Write what `checked_our_tensors` tells; one project tensor and one of its parts are in memory at a time."""
        self.checked_our_tensors(source, where=where)
        for rule in self._widest_first(source):
            sink.write(rule.ours, _assembled(rule, source))

    def _widest_first(self, source: TensorSource) -> list[Rule]:
        """So each tensor of a file is aligned; within a type the order of the model stays."""
        return sorted(self.rules, key=lambda rule: -rule.our_dtype(source).itemsize)


def _write_parts(rule: Rule, ours: Tensor, sink: TensorSink, dtype: torch.dtype) -> None:
    for part in rule.parts:
        sink.write(part.theirs, part.take(ours).to(dtype))


def _assembled(rule: Rule, source: TensorSource) -> Tensor:
    dtype = rule.our_dtype(source)
    covered = sum(prod(part.shape) for part in rule.parts) == prod(rule.shape)
    ours = (torch.empty if covered else torch.zeros)(rule.shape, dtype=dtype)
    for part in rule.parts:
        part.put(source.read(part.theirs), ours)
    return ours


def applied(rules: Iterable[Rule], *, layers: Sequence[int], num_experts: int = 0) -> Iterator[Rule]:
    """Rules written for {layer} and {expert}, once for each layer and, where they name one, for each expert."""
    pattern = tuple(rules)
    for layer in layers:
        for rule in pattern:
            if "{expert}" in rule.ours:
                yield from (rule.numbered(layer=layer, expert=expert) for expert in range(num_experts))
            else:
                yield rule.numbered(layer=layer)
