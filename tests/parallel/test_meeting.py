"""Ranks of one start find each other whatever earlier starts left in the store."""

import random
import threading
import time
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from megatron_moe.config.errors import PeerError
from megatron_moe.parallel.meeting import INVITATION, meet

RANKS = 4


def start(store: Store, ranks: int, order: list[int], gap_s: float) -> list[str]:
    """The ranks, each a thread, in this order; what each finds of the first rank's word."""
    found = [""] * ranks

    def run(rank: int) -> None:
        mine = meet(store, rank, ranks, 60.0)
        if rank == 0:
            mine.set("word", f"{random.random()}")
        found[rank] = mine.get("word").decode()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(gap_s)
    for thread in threads:
        thread.join()
    return found


def test_every_start_meets_afresh_in_a_store_that_stays() -> None:
    store, seen = HashStore(), set()
    store.set_timeout(timedelta(seconds=60))
    chosen = random.Random(3)
    for number in range(12):
        # worlds shrink and grow; the first rank comes last, so the others find an invitation of the past
        ranks = chosen.choice([2, 3, RANKS])
        order = list(range(1, ranks))
        chosen.shuffle(order)
        words = start(store, ranks, [*order, 0] if number % 2 else [0, *order], gap_s=0.02)
        assert len(set(words)) == 1 and words[0]
        seen.add(words[0])
    assert len(seen) == 12


def test_a_rank_without_a_first_one_gives_up_and_says_so() -> None:
    store = HashStore()
    store.set(INVITATION, "long ago")
    with pytest.raises(PeerError, match=r"^rank 3 found no first rank within 0 s \(--distributed-timeout-minutes\)"):
        meet(store, 3, RANKS, 0.2)


def test_the_list_of_a_start_that_is_over_takes_nobody_in() -> None:
    store = HashStore()
    store.set(INVITATION, "past")
    store.set("past/list", '["another", "one"]')
    with pytest.raises(PeerError):
        meet(store, 1, 3, 0.2)
    assert isinstance(meet(store, 0, 1, 0.2), PrefixStore)
