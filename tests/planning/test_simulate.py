"""A schedule played with costs takes exactly the time of its closed formula; a small one is worked out by hand."""

from collections.abc import Iterator
from fractions import Fraction

import pytest

from megatron_moe.pipeline.actions import Action, Kind, Pair, Pipeline
from megatron_moe.pipeline.schedule import Costs, Schedule, share
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.pipeline.verify import most_held
from megatron_moe.planning.simulate import Timeline, simulate

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741
ALL = SCHEDULES | {"forward_only": forward_only}
# each of the three is the smallest, and the largest, somewhere; pairs hide all, half or nothing
COSTS = (
    Costs(1, 1, 1),
    Costs(2, 3, 1),
    Costs(3, 1, 2, overlap=0),
    Costs(1, 2, 5, overlap=Fraction(1, 2)),
    Costs(Fraction(9, 10), Fraction(11, 10), Fraction(8, 10)),
    Costs(1, 0, 0),
)


def shapes(schedule: Schedule, ranks: int) -> Iterator[Pipeline]:
    """Fewer microbatches than ranks, as many, more, and numbers that are no multiple."""
    rounds = (1, 2, 3) if schedule.many_rounds else (1,)
    for microbatches in sorted({1, 2, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks, 2 * ranks + 3} - {0}):
        yield from (Pipeline(ranks, microbatches, several) for several in rounds)
    if schedule.many_rounds:
        yield Pipeline(ranks, 5 * ranks + 2, 2, ranks + 3)


def check_formula(schedule: Schedule, shape: Pipeline, costs: Costs) -> None:
    timeline = simulate(schedule(shape), shape, costs)
    assert timeline.total == schedule.span(shape, costs), shape
    assert sum(timeline.busy) == schedule.work(shape, costs), shape
    assert timeline.idle_share == schedule.idle_share(shape, costs), shape
    assert timeline.held == [schedule.held(shape, rank) for rank in range(shape.ranks)], shape


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_idle_share_is_exactly_the_formulas(name: str, costs: Costs) -> None:
    for ranks in (1, 2, 3, 4, 6):
        for shape in shapes(ALL[name], ranks):
            check_formula(ALL[name], shape, costs)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("ranks", "microbatches"), [(16, 37), (32, 64), (64, 63), (64, 66)])
def test_idle_share_is_exactly_the_formulas_on_many_ranks(name: str, ranks: int, microbatches: int) -> None:
    rounds = 2 if ALL[name].many_rounds else 1
    check_formula(ALL[name], Pipeline(ranks, microbatches, rounds), Costs(2, 3, 1))


def test_the_formulas_are_those_of_the_papers() -> None:
    """Ideal time, and what comes on top: arXiv:2006.09503, arXiv:2104.04473 section 2.2, arXiv:2401.10241 table 2."""
    ranks, microbatches = 8, 32
    shape, unit = Pipeline(ranks, microbatches), Costs(1, 1, 1)
    bubbles = {name: schedule.span(shape, unit) - 3 * microbatches for name, schedule in SCHEDULES.items()}
    assert bubbles["1f1b"] == 3 * (ranks - 1)
    assert bubbles["1f1b_split"] == 2 * (ranks - 1)
    assert bubbles["zb_h1"] == ranks - 1
    assert SCHEDULES["1f1b"].idle_share(shape, unit) == Fraction(ranks - 1, microbatches + ranks - 1)
    # two rounds halve the cost of a stage, and the bubble
    halves = Costs(Fraction(1, 2), Fraction(1, 2), Fraction(1, 2))
    interleaved = SCHEDULES["interleaved"].span(Pipeline(ranks, microbatches, 2), halves)
    assert interleaved - 3 * microbatches == Fraction(3 * (ranks - 1), 2)


BUBBLES = {
    "sequential": ("m·v·(p-1)·(F+B)", lambda p, m, v, c: m * v * (p - 1) * (c.forward + c.backward)),
    "1f1b": ("(p-1)·(F+B)", lambda p, m, v, c: (p - 1) * (c.forward + c.backward)),
    "1f1b_split": ("(p-1)·(F+I)", lambda p, m, v, c: (p - 1) * (c.forward + c.backward_input)),
    "zb_h1": (
        "(p-1)·(F+I-min(F,I,W)) for m >= p",
        lambda p, m, v, c: (
            (p - 1)
            * (c.forward + c.backward_input - min(c.forward, c.backward_input, c.backward_weight))
        ),
    ),
    "interleaved": ("(p-1)·(F+B) for m >= p", lambda p, m, v, c: (p - 1) * (c.forward + c.backward)),
    "1f1b_overlap": ("(p-1)·P for m >= 2p", lambda p, m, v, c: (p - 1) * c.pair),
    "forward_only": ("(p-1)·F for m >= p", lambda p, m, v, c: (p - 1) * c.forward),
}


@pytest.mark.parametrize("name", ALL)
def test_the_formula_that_people_are_shown_is_what_ranks_wait_on_average(name: str) -> None:
    text, bubble = BUBBLES[name]
    assert ALL[name].bubble == text
    for costs in COSTS:
        for shape in (Pipeline(3, 6), Pipeline(4, 11), *([Pipeline(3, 7, 2)] if ALL[name].many_rounds else [])):
            waited = shape.ranks * ALL[name].span(shape, costs) - ALL[name].work(shape, costs)
            assert waited == shape.ranks * bubble(shape.ranks, shape.microbatches, shape.rounds, costs)


def test_two_ranks_by_hand() -> None:
    """rank 0: F0 F1 .. B0-- .. B1--     rank 1: .. F0 B0-- F1 B1--      (times 0 to 9)"""
    shape = Pipeline(2, 2)
    timeline = simulate(SCHEDULES["1f1b"](shape), shape, Costs(1, 1, 1))
    assert [(str(turn.entry), turn.start, turn.end) for turn in timeline.ranks[0]] == [
        ("F0.0", 0, 1),
        ("F0.1", 1, 2),
        ("B0.0", 4, 6),
        ("B0.1", 7, 9),
    ]
    assert [turn.start for turn in timeline.ranks[1]] == [1, 2, 4, 5]
    assert timeline.total == 9 and timeline.busy == [6, 6] and timeline.held == [2, 1]
    assert timeline.idle_share == Fraction(1, 3)


def test_what_is_passed_on_takes_its_time_and_the_sender_goes_on() -> None:
    shape = Pipeline(2, 2)
    timeline = simulate(SCHEDULES["1f1b"](shape), shape, Costs(1, 1, 1), latency=3)
    assert [turn.start for turn in timeline.ranks[0]] == [0, 1, 10, 13]
    assert [turn.start for turn in timeline.ranks[1]] == [4, 5, 7, 8]
    # stages of one rank hand on for nothing
    alone = Pipeline(1, 2, rounds=3)
    assert simulate(SCHEDULES["interleaved"](alone), alone, Costs(1, 1, 1), latency=3).idle_share == 0


def test_two_microbatches_more_ahead_hide_the_way_between_ranks() -> None:
    """The reason for the long warm-up of the interleaved schedule."""
    shape = Pipeline(4, 64)
    times = {
        name: simulate(SCHEDULES[name](shape), shape, Costs(10, 10, 10), latency=2).total
        for name in ("1f1b", "interleaved")
    }
    assert times["interleaved"] == 30 * (64 + 3) + 2 * 3 * 2
    assert times["1f1b"] > times["interleaved"] + 2 * 60


def test_stages_may_differ() -> None:
    shape = Pipeline(2, 3)
    timeline = simulate(SCHEDULES["sequential"](shape), shape, [Costs(1, 1, 1), Costs(4, 5, 6)])
    assert timeline.total == 3 * (3 + 15)
    assert timeline.busy == [9, 45]
    with pytest.raises(ValueError, match="costs of 2 stages were given for a pipeline of 3"):
        simulate(SCHEDULES["sequential"](Pipeline(3, 1)), Pipeline(3, 1), [Costs(1, 1, 1)] * 2)


def test_a_pair_of_two_stages_costs_what_both_cost() -> None:
    """The forward pass of one round beside the backward pass of another."""
    shape = Pipeline(1, 2, rounds=2)
    order = [
        *(Action(F, 0, 0), Action(F, 1, 0), Action(F, 0, 1)),
        Pair(Action(F, 1, 1), Action(B, 1, 0)),
        *(Action(B, 1, 1), Action(B, 0, 0), Action(B, 0, 1)),
    ]
    for overlap, expected in ((1, 7), (0, 7 + 3), (Fraction(1, 3), 9)):
        each = [Costs(1, 1, 1, overlap), Costs(3, 3, 4, overlap)]
        turn = simulate([order], shape, each).ranks[0][3]
        assert turn.end - turn.start == expected


def test_a_schedule_that_waits_forever_is_refused() -> None:
    with pytest.raises(ValueError, match="waits forever"):
        simulate([[Action(B, 0, 0), Action(F, 0, 0)]], Pipeline(1, 1), Costs(1, 1, 1))


def test_floats_are_taken_as_well() -> None:
    shape = Pipeline(3, 5)
    costs = Costs(0.1, 0.15, 0.05)
    timeline = simulate(SCHEDULES["zb_h1"](shape), shape, costs)
    assert timeline.idle_share == pytest.approx(SCHEDULES["zb_h1"].idle_share(shape, costs))
    assert simulate(SCHEDULES["zb_h1"](shape), shape, Costs(0, 0, 0)).idle_share == 0
    assert Timeline([[]], [0]).total == 0
    assert share(1, 3) == Fraction(1, 3) and share(1.5, 3) == 0.5


def test_what_is_held_is_counted_by_lists_not_by_time() -> None:
    shape = Pipeline(4, 9)
    for name, schedule in SCHEDULES.items():
        lists = schedule(shape)
        slow = simulate(lists, shape, [Costs(1, 1, 1), Costs(9, 1, 1), Costs(1, 7, 1), Costs(1, 1, 8)], latency=2)
        assert slow.held == [most_held(entries) for entries in lists], name
