"""Every schedule is whole, never waits forever and holds what it states."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pair, Pipeline, flat
from megatron_moe.pipeline.interleaved import group_sizes
from megatron_moe.pipeline.schedule import Costs, Schedule
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.pipeline.verify import check_memory, check_schedule, most_held

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def in_flight(entries: list[Entry]) -> int:
    """Most passes that a rank holds at once, counted without looking at which."""
    held = most = 0
    for action in flat(entries):
        held += {F: 1, B: -1, W: -1}.get(action.kind, 0)
        most = max(most, held)
    return most


def shapes(schedule: Schedule, ranks: int) -> Iterator[Pipeline]:
    """Any number of microbatches, rounds and sizes of groups, where the schedule has them."""
    for microbatches in range(1, 18):
        yield Pipeline(ranks, microbatches)
        if schedule.many_rounds:
            for rounds in (2, 3):
                yield from (Pipeline(ranks, microbatches, rounds, ranks + more) for more in (0, 1, 3))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_every_schedule_is_right_and_holds_what_it_states_for_any_shape(name: str, num_ranks: int) -> None:
    schedule = SCHEDULES[name]
    assert schedule.name == name
    for shape in shapes(schedule, num_ranks):
        lists = schedule(shape)
        check_schedule(lists, shape)
        check_memory(lists, shape, schedule.held)
        assert list(map(most_held, lists)) == list(map(in_flight, lists))
        assert sum(isinstance(entry, Pair) for entries in lists for entry in entries) == schedule.pairs(shape)


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_evaluation_is_right_for_any_shape_and_holds_nothing(num_ranks: int) -> None:
    for shape in shapes(forward_only, num_ranks):
        lists = forward_only(shape)
        check_schedule(lists, shape, train=False)
        check_memory(lists, shape, forward_only.held)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches", "rounds"), [(64, 5, 1), (64, 70, 1), (16, 35, 4)])
def test_large_pipelines_are_right_too(name: str, ranks: int, microbatches: int, rounds: int) -> None:
    schedule = SCHEDULES[name]
    shape = Pipeline(ranks, microbatches, rounds if schedule.many_rounds else 1)
    lists = schedule(shape)
    check_schedule(lists, shape)
    check_memory(lists, shape, schedule.held)


Message = tuple[tuple[int, int], tuple[int, int]]  # (sending rank, way on or back), (sending stage, microbatch)


def message(action: Action, shape: Pipeline, *, received: bool) -> Message | None:
    """What the action receives, or what it sends; a rank has one channel each way, to the next rank and to the last."""
    way = 1 if action.kind is F else -1
    sender, receiver = (action.stage - way, action.stage) if received else (action.stage, action.stage + way)
    if action.kind is W or min(sender, receiver) < 0 or max(sender, receiver) == shape.stages:
        return None
    return (shape.rank_of(sender), way), (sender, action.microbatch)


def arrive_where_they_should(lists: Sequence[Sequence[Entry]], shape: Pipeline) -> bool:
    """Whether all ranks come to their ends when each takes what is first in its queue, whatever it is."""
    queues: dict[tuple[int, int], deque[tuple[int, int]]] = defaultdict(deque)
    waiting = [deque(entries) for entries in lists]
    moved = True
    while moved:
        moved = False
        for entries in waiting:
            while entries:
                parts = entries[0].parts
                arriving = [found for action in parts if (found := message(action, shape, received=True))]
                if not all(queues[queue] for queue, _ in arriving):
                    break
                for queue, wanted in arriving:
                    if queues[queue].popleft() != wanted:
                        return False
                for action in parts:
                    if sent := message(action, shape, received=False):
                        queues[sent[0]].append(sent[1])
                entries.popleft()
                moved = True
    return not any(waiting) and not any(queues.values())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7])
def test_messages_without_numbers_arrive_where_they_should(name: str, num_ranks: int) -> None:
    for shape in shapes(SCHEDULES[name], num_ranks):
        lists = SCHEDULES[name](shape)
        assert arrive_where_they_should(lists, shape)
        if shape.microbatches > 1:
            first, *others = lists
            assert not arrive_where_they_should([[backwards(entry, shape) for entry in first], *others], shape)


def backwards(entry: Entry, shape: Pipeline) -> Entry:
    """The same of the microbatch that is as far from the end as this one is from the start."""
    parts = [replace(action, microbatch=shape.microbatches - 1 - action.microbatch) for action in entry.parts]
    return Pair(*parts) if isinstance(entry, Pair) else parts[0]


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_neighbours_play_microbatches_in_one_order(num_stages: int) -> None:
    """Tensors arrive in the order in which they were sent: they carry no numbers."""
    for name, schedule in SCHEDULES.items():
        orders = {
            (kinds, tuple(action.microbatch for action in flat(actions) if action.kind in kinds))
            for actions in schedule(Pipeline(num_stages, 11))
            for kinds in ((F,), (B, I))
        }
        assert len(orders) == 2, name


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_1f1b_holds_at_most_as_many_microbatches_as_stages_behind(num_stages: int) -> None:
    for num_microbatches in range(1, 17):
        for name in ("1f1b", "1f1b_split"):
            for rank, actions in enumerate(SCHEDULES[name](Pipeline(num_stages, num_microbatches))):
                assert in_flight(actions) == min(num_stages - rank, num_microbatches)
        # the weight halves that are late fill the other ranks up to what the first one holds, and no further
        for actions in SCHEDULES["zb_h1"](Pipeline(num_stages, num_microbatches)):
            assert in_flight(actions) == min(num_stages, num_microbatches)
        for actions in SCHEDULES["sequential"](Pipeline(num_stages, num_microbatches)):
            assert in_flight(actions) == 1


def test_interleaving_costs_the_memory_of_its_paper() -> None:
    """p · (1 + (p - 1) / (p · v)) microbatches of whole ranks, which have v stages each."""
    for ranks, rounds in ((4, 2), (8, 3), (2, 5)):
        held = SCHEDULES["interleaved"].held(Pipeline(ranks, 8 * ranks, rounds), 0)
        assert held == ranks * rounds + ranks - 1


def written(actions: list[Entry]) -> str:
    return " ".join(map(str, actions))


def test_interleaved_two_ranks_with_two_stages_each_by_hand() -> None:
    first, second = SCHEDULES["interleaved"](Pipeline(2, 4, rounds=2))
    assert written(first) == (
        "F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3"
    )
    assert written(second) == (
        "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3"
    )
    assert written(forward_only(Pipeline(2, 3, rounds=2))[1]) == "F1.0 F1.1 F1.2 F3.0 F3.1 F3.2"


def test_zb_h1_on_three_ranks_by_hand() -> None:
    lists = SCHEDULES["zb_h1"](Pipeline(3, 4))
    assert written(lists[0]) == "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3"
    assert written(lists[1]) == "F1.0 F1.1 I1.0 F1.2 I1.1 W1.0 F1.3 I1.2 W1.1 I1.3 W1.2 W1.3"
    assert written(lists[2]) == "F2.0 I2.0 F2.1 I2.1 F2.2 I2.2 W2.0 F2.3 I2.3 W2.1 W2.2 W2.3"


def test_pairs_by_hand() -> None:
    first, second = SCHEDULES["1f1b_overlap"](Pipeline(2, 4))
    assert written(first) == "F0.0 F0.1 F0.2 F0.3|B0.0 B0.1 B0.2 B0.3"
    assert written(second) == "F1.0 F1.1|B1.0 F1.2|B1.1 F1.3|B1.2 B1.3"
    assert written(SCHEDULES["1f1b_overlap"](Pipeline(1, 2))[0]) == "F0.0 F0.1|B0.0 B0.1"


def test_a_rest_that_is_no_group_is_spread_over_the_others() -> None:
    assert group_sizes(Pipeline(4, 8)) == [4, 4]
    assert group_sizes(Pipeline(4, 11)) == [6, 5]
    assert group_sizes(Pipeline(4, 3)) == [3]
    assert group_sizes(Pipeline(4, 13, group=8)) == [8, 5]
    assert group_sizes(Pipeline(4, 11, group=8)) == [11]
    for microbatches in range(1, 80):
        for group in (4, 5, 9):
            sizes = group_sizes(Pipeline(4, microbatches, group=group))
            assert sum(sizes) == microbatches
            assert min(sizes) >= min(4, microbatches)


def test_a_shape_without_an_order_is_refused() -> None:
    for name in ("1f1b", "1f1b_split", "zb_h1", "1f1b_overlap"):
        with pytest.raises(ValueError, match=f"the schedule '{name}' has one stage a rank, not 2 rounds"):
            SCHEDULES[name](Pipeline(2, 4, rounds=2))
    for schedule in (SCHEDULES["interleaved"], forward_only):
        with pytest.raises(ValueError, match="a group of 3 microbatches is too small for 4 pipeline ranks.*use 4 or"):
            schedule(Pipeline(4, 8, rounds=2, group=3))


@pytest.mark.parametrize("costs", [Costs(1, 1, 1), Costs(2, 3, 1), Costs(1, 0, 5)])
def test_idle_share_is_between_none_and_all(costs: Costs) -> None:
    for schedule in SCHEDULES.values():
        assert schedule.idle_share(Pipeline(1, 3), costs) == 0
        shares = [schedule.idle_share(Pipeline(4, microbatches), costs) for microbatches in (4, 8, 16, 32)]
        assert 1 > shares[0] and shares[-1] > 0
        # never more with more microbatches; the same when there is one at a time
        assert shares == sorted(shares, reverse=True)


def test_two_stages_and_three_microbatches_by_hand() -> None:
    first, second = SCHEDULES["1f1b"](Pipeline(2, 3))
    assert written(first) == "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2"
    assert written(second) == "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2"
    first, second = SCHEDULES["1f1b_split"](Pipeline(2, 2))
    assert written(first) == "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1"
    assert written(second) == "F1.0 I1.0 W1.0 F1.1 I1.1 W1.1"
    assert written(SCHEDULES["sequential"](Pipeline(2, 2))[1]) == "F1.0 B1.0 F1.1 B1.1"
