"""Programs of collectives that all ranks of an axis run, and one rank's mistake in one of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_moe.parallel.state import Axis

DTYPES = (torch.float32, torch.float64, torch.int64, torch.bfloat16)
OPS = ("sum", "max", "min")


@dataclass(frozen=True)
class Step:
    """One call of a program: what, on which tensor."""

    kind: str
    rows: int  # that each rank brings
    width: int
    dtype: torch.dtype
    op: str
    source: int

    @property
    def meaning(self) -> tuple[object, ...]:
        """What of it is looked at."""
        shape = (self.rows, self.width, self.dtype)
        more = {"barrier": (), "all_reduce": (*shape, self.op), "broadcast": (*shape, self.source)}
        return more.get(self.kind, shape)

    def same(self, other: "Step") -> bool:
        return (self.kind, self.meaning) == (other.kind, other.meaning)


def _tensor(step: Step, axis: Axis, blocks: int = 1) -> Tensor:
    return torch.ones(step.rows * blocks, step.width, dtype=step.dtype) * (axis.rank + 1)


def _all_reduce(step: Step, axis: Axis) -> None:
    axis.comm.all_reduce_(_tensor(step, axis), step.op)


def _all_gather(step: Step, axis: Axis) -> None:
    axis.comm.all_gather(_tensor(step, axis), [step.rows] * axis.size)


def _reduce_scatter(step: Step, axis: Axis) -> None:
    axis.comm.reduce_scatter(_tensor(step, axis, axis.size), [step.rows] * axis.size)


def _all_to_all(step: Step, axis: Axis) -> None:
    each = [step.rows] * axis.size
    axis.comm.all_to_all(_tensor(step, axis, axis.size), each, each)


def _broadcast(step: Step, axis: Axis) -> None:
    axis.comm.broadcast_(_tensor(step, axis), step.source)


def _ring(step: Step, axis: Axis) -> None:
    mine = _tensor(step, axis)
    axis.comm.send_receive_(
        mine, (axis.rank + 1) % axis.size, torch.empty_like(mine), (axis.rank - 1) % axis.size
    ).wait()


def _barrier(step: Step, axis: Axis) -> None:
    axis.comm.barrier()


CALLS: dict[str, Callable[[Step, Axis], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "ring": _ring,
    "barrier": _barrier,
}


def draw_step(rng: random.Random, size: int) -> Step:
    return Step(
        rng.choice(sorted(CALLS)),
        rng.randint(1, 4),
        rng.randint(1, 4),
        rng.choice(DTYPES),
        rng.choice(OPS),
        rng.randrange(size),
    )


# as no step of a program is
ENDING = Step("all_reduce", 1, 9, torch.float32, "sum", 0)


def play(program: list[Step], axis: Axis) -> None:
    """All of it, and what stands at the end of every program."""
    for step in [*program, ENDING]:
        CALLS[step.kind](step, axis)


def swap(program: list[Step], place: int, rng: random.Random, size: int) -> list[Step]:
    return [*program[:place], program[place + 1], program[place], *program[place + 2 :]]


def other_shape(program: list[Step], place: int, rng: random.Random, size: int) -> list[Step]:
    step = program[place]
    changed = replace(step, rows=step.rows + 1) if rng.random() < 0.5 else replace(step, width=step.width + 1)
    return [*program[:place], changed, *program[place + 1 :]]


def other_dtype(program: list[Step], place: int, rng: random.Random, size: int) -> list[Step]:
    step = program[place]
    dtype = rng.choice([dtype for dtype in DTYPES if dtype != step.dtype])
    return [*program[:place], replace(step, dtype=dtype), *program[place + 1 :]]


def other_operation(program: list[Step], place: int, rng: random.Random, size: int) -> list[Step]:
    step = program[place]
    return [
        *program[:place],
        replace(
            step,
            op=rng.choice([op for op in OPS if op != step.op]),
            source=(step.source + 1) % size,
        ),
        *program[place + 1 :],
    ]


def missing(program: list[Step], place: int, rng: random.Random, size: int) -> list[Step]:
    return [*program[:place], *program[place + 1 :]]


def extra(program: list[Step], place: int, rng: random.Random, size: int) -> list[Step]:
    return [*program[:place], draw_step(rng, size), *program[place:]]


MISTAKES = (swap, other_shape, other_dtype, other_operation, missing, extra)


@dataclass(frozen=True)
class Desync:
    """One rank of the axis runs another program than all others."""

    mistake: str
    culprit: int  # place on the axis
    right: list[Step]
    wrong: list[Step]

    @classmethod
    def draw(cls, number: int, rng: random.Random, size: int) -> "Desync":
        """The kinds of mistakes come in turn; the programs differ for certain."""
        mistake = MISTAKES[number % len(MISTAKES)]
        while True:
            right = [draw_step(rng, size) for _ in range(rng.randint(2, 5))]
            wrong = mistake(right, rng.randrange(len(right) - (mistake is swap)), rng, size)
            if len(right) != len(wrong) or not all(a.same(b) for a, b in zip(right, wrong, strict=True)):
                return cls(mistake.__name__, rng.randrange(size), right, wrong)

    def play(self, axis: Axis) -> None:
        play(self.wrong if axis.rank == self.culprit else self.right, axis)

    @property
    def first_wrong(self) -> int:
        """The number, counted from 1, of the first call that does not fit; that of the ending may be it."""
        pairs = zip([*self.right, ENDING], [*self.wrong, ENDING], strict=False)
        return next(place for place, (one, other) in enumerate(pairs, 1) if not one.same(other))
