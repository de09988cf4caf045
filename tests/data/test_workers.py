"""Processes that work in turn: results in order, few items on the way, deaths noticed."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from megatron_moe.config.errors import MegatronMoEError
from megatron_moe.data.workers import IN_FLIGHT, Workers


def make_square() -> Callable[[int], tuple[int, int]]:
    return lambda number: (number * number, os.getpid())


def make_large() -> Callable[[bytes], bytes]:
    return lambda content: content * 2


def _die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def make_death() -> Callable[[int], int]:
    return _die_at_three


def test_one_worker_is_this_process() -> None:
    with Workers(make_square, 1) as workers:
        assert list(workers.map(range(5))) == [(number * number, os.getpid()) for number in range(5)]
    assert multiprocessing.active_children() == []


def test_results_come_in_order_and_few_items_are_on_the_way() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield number

    with Workers(make_square, 2) as workers:
        processes = set()
        for done, (square, process) in enumerate(workers.map(items())):
            assert square == done * done
            assert taken <= done + 1 + 2 * IN_FLIGHT
            processes.add(process)
    assert len(processes) == 2 and os.getpid() not in processes
    assert multiprocessing.active_children() == []


def test_large_items_and_results_do_not_block_each_other() -> None:
    with Workers(make_large, 2) as workers:
        assert [len(result) for result in workers.map(b"x" * 2_000_000 for _ in range(8))] == [4_000_000] * 8


def test_the_death_of_a_worker_is_told() -> None:
    with pytest.raises(MegatronMoEError, match="exit code -9.*memory"), Workers(make_death, 2) as workers:
        assert list(workers.map(range(10)))
    assert multiprocessing.active_children() == []
