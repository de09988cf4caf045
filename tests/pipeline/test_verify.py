"""The proof of a schedule finds what is wrong with it: each mistake, wherever it is."""

import pytest

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pipeline
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.pipeline.verify import Channel, channel, check_memory, check_schedule, most_held, needs

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


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
