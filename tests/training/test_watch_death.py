"""A rank that dies ends the others soon, and they say who it was and of what."""

import os
import resource
import signal
import statistics
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from goals import Trials

from megatron_moe.training.watch.lines import Message
from megatron_moe.training.watch.rank import Watched
from megatron_moe.training.watch.server import Settings
from megatron_moe.training.watch.verdict import Limits
from megatron_moe.training.watch.watcher import Watcher
from tests.faults.mortal import DONE, in_child
from tests.training.watched_ranks import Plan, start

# those of crashes and of the alarm clock are caught by the test runner
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2)


@pytest.mark.timeout(3600)
@pytest.mark.goal(
    "R18",
    ci=50,
    nightly=300,
    what="one of 3 ranks dies of a signal while the others wait for it or compute: they end with 86 and name it",
)
def test_the_others_end_and_name_rank_host_process_and_signal(trials: Trials, tmp_path: Path) -> None:
    took = []
    for number, rng in trials:
        victim = rng.randrange(3)
        others = [rank for rank in range(3) if rank != victim]
        # some notice nothing by themselves
        computing = frozenset(rank for rank in others if rng.random() < 0.4)
        ranks = start(Plan(3, at_step=2, computes=computing), tmp_path / str(number))
        ranks.await_step()
        killed_by = rng.choice(SIGNALS)
        os.kill(ranks.pids[victim], killed_by)
        struck = time.monotonic()
        ranks.await_end(others)
        took.append(max(ranks.ended_at.values()) - struck)
        ranks.await_end([victim])
        for rank in others:
            said = ranks.said(rank)
            assert ranks.codes[rank] == 86, said
            name = f"rank {rank} lost another rank: rank {victim} (host {os.uname().nodename}, "
            assert name + f"pid {ranks.pids[victim]}) was killed by {killed_by.name}, in step " in said, said
            assert "collective number" in said
        assert ranks.orphans() == []
    trials.notes["median until all ended (s)"] = round(statistics.median(took), 3)
    trials.notes["longest (s)"] = round(max(took), 3)
    # the bar is one second; the machine of the test may be busy
    assert statistics.median(took) < 5.0


def test_watchers_that_are_late_hear_of_the_death_of_the_first_rank(tmp_path: Path) -> None:
    join = Watcher._join

    def late(watcher: Watcher, message: Message) -> None:
        time.sleep(0.5)
        join(watcher, message)

    with mock.patch.object(Watcher, "_join", late):
        ranks = start(Plan(3, at_step=0, computes=frozenset({1})), tmp_path / "ranks")
    ranks.await_step()
    os.kill(ranks.pids[0], signal.SIGKILL)
    # what it died of can be read until its parent asks
    ranks.await_end([1, 2])
    ranks.await_end([0])
    for rank in (1, 2):
        assert f"rank {rank} lost another rank: rank 0 (host " in ranks.said(rank), ranks.said(rank)
        assert ranks.codes[rank] == 86 and "was killed by SIGKILL" in ranks.said(rank)
    assert ranks.orphans() == []


def test_news_of_who_died_may_be_a_second_late(tmp_path: Path) -> None:
    watch = Watched(0, Settings(2, Limits(None, None, None), None, tmp_path))
    watch._joined = True
    news = threading.Timer(1.0, watch._hear, ({"dead": "rank 1 was killed", "grace": 9.0}, None))
    news.start()
    assert watch.cause() == "rank 1 was killed"
    news.join()


def test_a_rank_with_a_thousand_open_files_is_watched_too(tmp_path: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most))
        for _ in range(1100):
            os.open(os.devnull, os.O_RDONLY)
        with Watched(0, Settings(1, Limits(None, None, None), None, tmp_path)):
            time.sleep(0.2)
            assert "watch" in [thread.name for thread in threading.enumerate()], "the thread that listens is gone"

    assert in_child(work, under=tmp_path, log=tmp_path / "log") == DONE, (tmp_path / "log").read_text()
