"""Every schedule is whole and never waits forever, and the check that says so finds mistakes."""

import pytest

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pipeline, flat
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.pipeline.verify import check_schedule, needs

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def in_flight(entries: list[Entry]) -> int:
    """Most microbatches that a rank holds at once."""
    held = most = 0
    for action in flat(entries):
        held += {F: 1, B: -1, W: -1}.get(action.kind, 0)
        most = max(most, held)
    return most


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_every_schedule_is_right_for_any_number_of_microbatches(name: str, num_stages: int) -> None:
    for num_microbatches in range(1, 17):
        shape = Pipeline(num_stages, num_microbatches)
        check_schedule(SCHEDULES[name](shape), shape)
        check_schedule(forward_only(shape), shape, train=False)


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
        for actions in SCHEDULES["sequential"](Pipeline(num_stages, num_microbatches)):
            assert in_flight(actions) == 1


def written(actions: list[Entry]) -> str:
    return " ".join(map(str, actions))


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
    for rank, entries in enumerate(lists):
        forward = next(place for place, entry in enumerate(entries) if Action(F, rank, 2) in entry.parts)
        backward = next(
            place
            for place, entry in enumerate(entries)
            if any(action.kind in (B, I) and action.microbatch == 2 for action in entry.parts)
        )
        swapped = list(entries)
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
    with pytest.raises(ValueError, match="rank 1 does not receive from rank 0 in the order in which it sends"):
        check_schedule(lists, Pipeline(3, 4))
    first = [Action(F, 0, 0), Action(F, 0, 1), Action(B, 0, 0), Action(B, 0, 1)]
    second = [Action(F, 1, 0), Action(F, 1, 1), Action(B, 1, 1), Action(B, 1, 0)]
    with pytest.raises(ValueError, match="rank 0 does not receive from rank 1"):
        check_schedule([first, second], Pipeline(2, 2))
