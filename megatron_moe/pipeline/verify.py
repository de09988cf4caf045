"""Proof that a schedule is complete, ordered, free of deadlock and within its memory.

It is played with blocking receives and with sends that only begin, and are waited for at the end of the step. A send
may itself wait until its receive is posted (a rendezvous, as with NCCL) and hold up those behind it in its channel:
the receives of a channel come in the order of its sends, so the first send that has not left always belongs to the
next receive, and no receive waits for a send that stands behind another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pipeline, flat


def needs(action: Action, num_stages: int) -> list[Action]:
    """The actions that must be over before this one can start."""
    kind, stage, number = action.kind, action.stage, action.microbatch
    if kind is Kind.FORWARD:
        return [Action(Kind.FORWARD, stage - 1, number)] if stage else []
    if kind is Kind.BACKWARD_WEIGHT:
        return [Action(Kind.BACKWARD_INPUT, stage, number)]
    # the input half and the whole pass wait for the same: the gradient from the stage behind
    return [Action(Kind.FORWARD, stage, number)] + (
        [Action(Kind.BACKWARD_INPUT, stage + 1, number)] if stage + 1 < num_stages else []
    )


def marks(action: Action) -> set[Action]:
    """What is over once this action is: a whole backward pass is both halves."""
    if action.kind is Kind.BACKWARD:
        halves = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
        return {Action(kind, action.stage, action.microbatch) for kind in halves}
    return {action}


def check_schedule(lists: Sequence[Sequence[Entry]], shape: Pipeline, *, train: bool = True) -> None:
    """Raises ValueError unless every stage does everything once, in an order that never waits forever."""
    kinds = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if train else (Kind.FORWARD,)
    wanted = {
        Action(kind, stage, number)
        for kind in kinds
        for stage in range(shape.stages)
        for number in range(shape.microbatches)
    }
    done: set[Action] = set()
    position = [0] * len(lists)
    up_and_down = [*range(len(lists)), *reversed(range(len(lists)))]  # the ways of activations and of gradients
    moved = True
    while moved:
        moved = False
        for rank in up_and_down:
            actions = lists[rank]
            while position[rank] < len(actions) and _ready(actions[position[rank]], done, shape):
                for action in actions[position[rank]].parts:
                    if marks(action) & done:
                        raise ValueError(f"rank {rank} does {action} twice")
                    done |= marks(action)
                position[rank] += 1
                moved = True
    stuck = [f"rank {rank} at {lists[rank][at]}" for rank, at in enumerate(position) if at < len(lists[rank])]
    if stuck:
        raise ValueError(f"the schedule waits forever: {', '.join(stuck)}")
    if done != wanted:
        missing = sorted(map(str, wanted - done)) or sorted(map(str, done - wanted))
        raise ValueError(f"the schedule is not complete, or does too much: {missing[:5]}")
    _check_order([flat(entries) for entries in lists], shape)


def _ready(entry: Entry, done: set[Action], shape: Pipeline) -> bool:
    """Neither half of a pair may wait for the other: both begin together."""
    return all(need in done for action in entry.parts for need in needs(action, shape.stages))


@dataclass(frozen=True)
class Channel:
    """One queue of messages: they arrive in the order in which they were sent, and carry no numbers."""

    name: str  # pp or pp_back between neighbours, wrap or wrap_back between the last rank and the first one
    sender: int
    receiver: int


def channel(sender: int, receiver: int, shape: Pipeline) -> Channel | None:
    """Over which one stage hands to another; None where both stand on one rank."""
    ranks = shape.rank_of(sender), shape.rank_of(receiver)
    if ranks[0] == ranks[1]:
        return None
    onward = receiver > sender
    wraps = onward != (ranks[1] > ranks[0])
    return Channel(("wrap" if wraps else "pp") + ("" if onward else "_back"), *ranks)


def _check_order(lists: Sequence[Sequence[Action]], shape: Pipeline) -> None:
    """Each channel's receives are in the order of its sends."""
    sent: dict[Channel, list[tuple[int, int]]] = {}
    received: dict[Channel, list[tuple[int, int]]] = {}
    for action in (action for actions in lists for action in actions if action.kind is not Kind.BACKWARD_WEIGHT):
        step = 1 if action.kind is Kind.FORWARD else -1
        for ends, messages in (
            ((action.stage, action.stage + step), sent),
            ((action.stage - step, action.stage), received),
        ):
            used = channel(*ends, shape) if 0 <= min(ends) and max(ends) < shape.stages else None
            if used:
                messages.setdefault(used, []).append((ends[0], action.microbatch))
    for used, order in sent.items():
        if order != received[used]:
            raise ValueError(
                f"rank {used.receiver} does not receive from rank {used.sender} over {used.name} in the order in which "
                "it sends"
            )


def most_held(entries: Sequence[Entry]) -> int:
    """Most pairs of stage and microbatch whose activations a rank holds at once.

    They are held from the forward pass until the backward pass is over, its weight half included; what has no backward
    pass keeps nothing.
    """
    actions = flat(entries)
    ends = {(action.stage, action.microbatch): action for action in actions if action.kind is not Kind.FORWARD}
    held = most = 0
    for action in actions:
        last = ends.get((action.stage, action.microbatch))
        if last is not None:
            held += (action.kind is Kind.FORWARD) - (action is last)
        most = max(most, held)
    return most


def check_memory(lists: Sequence[Sequence[Entry]], shape: Pipeline, stated: Callable[[Pipeline, int], int]) -> None:
    """Raises ValueError unless every rank holds as much as is stated of it: more is a lie, less is memory not used."""
    for rank, entries in enumerate(lists):
        held, allowed = most_held(entries), stated(shape, rank)
        if held != allowed:
            raise ValueError(
                f"rank {rank} holds the activations of {held} passes at once; the schedule states {allowed}"
            )
