"""One request to stop, a signal or a file, ends the run after the step, on all ranks; a second signal ends it now."""

import os
import signal
import time
from pathlib import Path

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


def test_a_file_that_appears_asks_to_stop_and_is_named(tmp_path: Path) -> None:
    with StopSignals(kill_switch=tmp_path / "stop") as signals:
        assert not signals.agreed(WORLD, CPU)
        (tmp_path / "stop").touch()
        assert not signals.stopped
        assert signals.agreed(WORLD, CPU)
        assert signals.stopped and signals.reason == f"the file {tmp_path / 'stop'}"


def test_a_signal_is_said_to_be_one() -> None:
    with StopSignals(kill_switch=Path("nowhere")) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed(WORLD, CPU)
        assert signals.reason == "a signal"


def agree_on_a_file(rank: int, world_size: int, folder: str, seen_by: int) -> list[str | None]:
    """Each rank looks for a file of its own name, as on file systems that differ; only rank `seen_by` has one."""
    state = ParallelState.distributed(Grid(world_size))
    with StopSignals(kill_switch=Path(folder) / f"stop{rank}") as signals:
        before = signals.agreed(state.world, CPU)
        if rank == seen_by:
            (Path(folder) / f"stop{rank}").touch()
        after = signals.agreed(state.world, CPU)
    return [str(before), str(after), signals.reason and signals.reason.partition(" ")[0]]


def test_what_the_first_rank_sees_counts_on_all(tmp_path: Path) -> None:
    assert run_on_ranks(2, agree_on_a_file, str(tmp_path), 0) == [["False", "True", "the"]] * 2


def test_what_another_rank_sees_does_not_count(tmp_path: Path) -> None:
    assert run_on_ranks(2, agree_on_a_file, str(tmp_path), 1) == [["False", "False", None]] * 2
