"""One request to stop ends the run after the step, on all ranks; a second one ends it now; an echo is no second one."""

import os
import signal
import time

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.config.errors import PeerError
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.signals import ECHO_SECONDS, SIGNALS, StopSignals

CPU = torch.device("cpu")
WORLD = ParallelState.alone().world


class Clock:
    """Seconds that stand still until a test moves them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_once_the_step_is_over(number: signal.Signals) -> None:
    with StopSignals() as signals:
        assert not signals.agreed(WORLD, CPU)
        assert not signals.stopped
        os.kill(os.getpid(), number)
        assert signals.agreed(WORLD, CPU)
        assert signals.stopped


def test_the_handlers_of_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def hear_echoes(rank: int, world_size: int) -> bool:
    clock = Clock()
    with StopSignals(clock) as signals:
        for number, passed in ((signal.SIGTERM, 0.0), (signal.SIGTERM, 0.1), (signal.SIGUSR1, 1.8)):
            clock.now += passed
            os.kill(os.getpid(), number)
        return signals.agreed(WORLD, CPU)


def test_the_same_request_forwarded_within_two_seconds_is_one_request() -> None:
    # on a rank of its own: who takes an echo for a second request dies of it
    assert run_on_ranks(1, hear_echoes) == [True]


def test_an_old_request_does_not_reach_into_the_next_run() -> None:
    with StopSignals() as first:
        os.kill(os.getpid(), signal.SIGTERM)
    with StopSignals() as second:
        assert not second.agreed(WORLD, CPU)
    assert first.agreed(WORLD, CPU)


def ask_twice(rank: int, world_size: int, number: int, survives_signals: bool) -> str:
    if survives_signals:  # as process 1 of a container does
        signal.raise_signal = lambda number: None
    clock = Clock()
    with StopSignals(clock):
        os.kill(os.getpid(), number)
        clock.now += ECHO_SECONDS
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    return "alive"


@pytest.mark.parametrize("survives_signals", [False, True])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_request_ends_the_process_now(number: signal.Signals, survives_signals: bool) -> None:
    with pytest.raises(PeerError, match="died without a word"):
        run_on_ranks(1, ask_twice, int(number), survives_signals)


def agree(rank: int, world_size: int) -> list[bool]:
    state = ParallelState.distributed(Grid(world_size))
    with StopSignals() as signals:
        found = [signals.agreed(state.world, CPU)]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        found.append(signals.agreed(state.world, CPU))
    return found


def test_all_ranks_stop_when_one_was_asked() -> None:
    assert run_on_ranks(3, agree) == [[False, True]] * 3
