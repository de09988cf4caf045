"""Proof that a schedule is complete, ordered and free of deadlock, by playing it with blocking receives and unbounded
sends."""

from collections.abc import Sequence

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


def _marks(action: Action) -> set[Action]:
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
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while position[rank] < len(actions) and _ready(actions[position[rank]], done, shape):
                for action in actions[position[rank]].parts:
                    if _marks(action) & done:
                        raise ValueError(f"rank {rank} does {action} twice")
                    done |= _marks(action)
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


def _check_order(lists: Sequence[Sequence[Action]], shape: Pipeline) -> None:
    """Tensors carry no numbers: a rank must receive from each neighbour in the order in which that one sends."""
    for kinds, onward in (((Kind.FORWARD,), 1), ((Kind.BACKWARD, Kind.BACKWARD_INPUT), -1)):
        sent: dict[tuple[int, int], list[tuple[int, int]]] = {}
        received: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for rank, actions in enumerate(lists):
            for action in actions:
                if action.kind not in kinds:
                    continue
                if 0 <= action.stage + onward < shape.stages:
                    to = shape.rank_of(action.stage + onward)
                    sent.setdefault((rank, to), []).append((action.stage, action.microbatch))
                if 0 <= action.stage - onward < shape.stages:
                    source = shape.rank_of(action.stage - onward)
                    received.setdefault((source, rank), []).append((action.stage - onward, action.microbatch))
        for pair in sent:
            if pair[0] != pair[1] and sent[pair] != received[pair]:
                raise ValueError(f"rank {pair[1]} does not receive from rank {pair[0]} in the order in which it sends")
