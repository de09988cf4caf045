"""Every schedule is whole, never waits forever and holds what it states; the check that says so finds mistakes."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pair, Pipeline, flat
from megatron_moe.pipeline.interleaved import group_sizes
from megatron_moe.pipeline.schedule import Costs, Schedule
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.pipeline.verify import Channel, channel, check_memory, check_schedule, most_held, needs

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
        # one after the other, more microbatches make nobody wait less
        assert shares == sorted(shares, reverse=True)


def test_two_stages_and_three_microbatches_by_hand() -> None:
    first, second = SCHEDULES["1f1b"](Pipeline(2, 3))
    assert written(first) == "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2"
    assert written(second) == "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2"
    first, second = SCHEDULES["1f1b_split"](Pipeline(2, 2))
    assert written(first) == "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1"
    assert written(second) == "F1.0 I1.0 W1.0 F1.1 I1.1 W1.1"
    assert written(SCHEDULES["sequential"](Pipeline(2, 2))[1]) == "F1.0 B1.0 F1.1 B1.1"


def test_what_an_action_waits_for() -> None:
    assert needs(Action(F, 0, 4), 3) == []
    assert needs(Action(F, 2, 4), 3) == [Action(F, 1, 4)]
    assert needs(Action(B, 2, 4), 3) == [Action(F, 2, 4)]
    assert needs(Action(I, 1, 4), 3) == [Action(F, 1, 4), Action(I, 2, 4)]
    assert needs(Action(W, 1, 4), 3) == [Action(I, 1, 4)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_missing_or_doubled_action_is_found_wherever_it_is(name: str) -> None:
    lists = SCHEDULES[name](Pipeline(3, 4))
    for rank, actions in enumerate(lists):
        for place in range(len(actions)):
            shorter = [*lists[:rank], actions[:place] + actions[place + 1 :], *lists[rank + 1 :]]
            with pytest.raises(ValueError, match="waits forever|not complete"):
                check_schedule(shorter, Pipeline(3, 4))
            doubled = [*lists[:rank], actions[: place + 1] + actions[place:], *lists[rank + 1 :]]
            with pytest.raises(ValueError, match="twice"):
                check_schedule(doubled, Pipeline(3, 4))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_backward_pass_before_its_forward_pass_is_found(name: str) -> None:
    lists = SCHEDULES[name](Pipeline(3, 4))
    for rank, actions in enumerate(lists):
        forward, backward = (
            next(
                place
                for place, entry in enumerate(actions)
                if any(part.kind in kinds and part.microbatch == 2 for part in entry.parts)
            )
            for kinds in ((F,), (B, I))
        )
        swapped = list(actions)
        swapped[forward], swapped[backward] = swapped[backward], swapped[forward]
        with pytest.raises(ValueError, match="waits forever"):
            check_schedule([*lists[:rank], swapped, *lists[rank + 1 :]], Pipeline(3, 4))


def test_a_weight_half_before_its_input_half_is_found() -> None:
    lists = SCHEDULES["1f1b_split"](Pipeline(2, 2))
    lists[0][2], lists[0][3] = lists[0][3], lists[0][2]
    with pytest.raises(ValueError, match=r"waits forever: rank 0 at W0\.0"):
        check_schedule(lists, Pipeline(2, 2))


def test_ranks_that_wait_for_each_other_are_found() -> None:
    # the first stage wants the gradient of 0 before it forwards 1, the second one wants both before any backward pass
    first = [Action(F, 0, 0), Action(B, 0, 0), Action(F, 0, 1), Action(B, 0, 1)]
    second = [Action(F, 1, 0), Action(F, 1, 1), Action(B, 1, 0), Action(B, 1, 1)]
    with pytest.raises(ValueError, match=r"rank 0 at B0\.0, rank 1 at F1\.1"):
        check_schedule([first, second], Pipeline(2, 2))


def test_more_than_asked_for_is_found() -> None:
    with pytest.raises(ValueError, match="does too much"):
        check_schedule(SCHEDULES["1f1b"](Pipeline(2, 3)), Pipeline(2, 2))
    with pytest.raises(ValueError, match="does too much"):
        check_schedule(SCHEDULES["1f1b"](Pipeline(2, 2)), Pipeline(2, 2), train=False)
    with pytest.raises(ValueError, match="not complete"):
        check_schedule(forward_only(Pipeline(2, 2)), Pipeline(2, 2))


def test_receiving_in_another_order_than_sent_is_found() -> None:
    """Each action has what it needs, and yet the second stage would take microbatch 1 for microbatch 0."""
    lists = SCHEDULES["1f1b"](Pipeline(3, 4))
    lists[0][0], lists[0][1] = lists[0][1], lists[0][0]
    with pytest.raises(ValueError, match="rank 1 does not receive from rank 0 over pp in the order in which it sends"):
        check_schedule(lists, Pipeline(3, 4))
    first = [Action(F, 0, 0), Action(F, 0, 1), Action(B, 0, 0), Action(B, 0, 1)]
    second = [Action(F, 1, 0), Action(F, 1, 1), Action(B, 1, 1), Action(B, 1, 0)]
    with pytest.raises(ValueError, match="rank 0 does not receive from rank 1"):
        check_schedule([first, second], Pipeline(2, 2))


def test_the_last_rank_and_the_first_one_have_channels_of_their_own() -> None:
    shape = Pipeline(2, 4, rounds=2)
    names = {(one, other): channel(one, other, shape) for one in range(4) for other in (one - 1, one + 1)}
    assert names[0, 1] == names[2, 3] == Channel("pp", 0, 1)
    assert names[1, 2] == Channel("wrap", 1, 0)
    assert names[1, 0] == names[3, 2] == Channel("pp_back", 1, 0)
    assert names[2, 1] == Channel("wrap_back", 0, 1)
    assert channel(0, 1, Pipeline(1, 4, rounds=2)) is None
    assert channel(3, 4, Pipeline(4, 4, rounds=2)) == Channel("wrap", 3, 0)


@pytest.mark.parametrize(("kind", "stages", "name"), [(F, (1, 2), "wrap"), (B, (2, 1), "wrap_back")])
def test_another_order_over_the_wrap_is_found(kind: Kind, stages: tuple[int, int], name: str) -> None:
    """Two microbatches, whole groups: every rank has what it needs, but takes one message for the other."""
    shape = Pipeline(2, 2, rounds=2)
    lists = [
        [Action(F, 0, 0), Action(F, 0, 1), Action(F, 2, 0), Action(F, 2, 1)],
        [Action(F, 1, 0), Action(F, 1, 1), Action(F, 3, 0), Action(F, 3, 1)],
    ]
    backward = [
        [Action(B, 2, 0), Action(B, 2, 1), Action(B, 0, 0), Action(B, 0, 1)],
        [Action(B, 3, 0), Action(B, 3, 1), Action(B, 1, 0), Action(B, 1, 1)],
    ]
    whole: list[list[Entry]] = [[*one, *other] for one, other in zip(lists, backward, strict=True)]
    check_schedule(whole, shape)
    # the sender's order alone changes, and what depends on it further on
    for rank, entries in enumerate(whole):
        for stage in range(rank, 4, 2):
            if (stage >= stages[1]) if kind is F else (stage <= stages[1]):
                places = [entries.index(Action(kind, stage, number)) for number in (0, 1)]
                entries[places[0]], entries[places[1]] = entries[places[1]], entries[places[0]]
    with pytest.raises(ValueError, match=f"over {name} in the order"):
        check_schedule(whole, shape)


def test_more_memory_than_stated_and_less_are_found() -> None:
    shape = Pipeline(3, 4)
    held = SCHEDULES["1f1b"].held
    lists = SCHEDULES["1f1b"](shape)
    lists[1].insert(0, lists[1].pop(lists[1].index(Action(F, 1, 2))))
    with pytest.raises(ValueError, match="rank 1 holds the activations of 3 passes at once; the schedule states 2"):
        check_memory(lists, shape, held)
    with pytest.raises(ValueError, match="rank 0 holds the activations of 1 passes at once; the schedule states 3"):
        check_memory(SCHEDULES["sequential"](shape), shape, held)
    # a weight half that is still to come keeps what its microbatch left
    late = [Action(F, 0, 0), Action(I, 0, 0), Action(F, 0, 1), Action(I, 0, 1), Action(W, 0, 0), Action(W, 0, 1)]
    assert most_held(late) == 2
