"""The ranks of one start find each other in a store that still holds what earlier starts left there.

torchrun keeps its store over restarts, so the addresses of dead ranks stay in it. Its count of restarts tells starts
apart on one node only: an agent that joined later, or that restarted for another's sake, counts from elsewhere. So the
first rank draws a name for the start, and the others take part in none but the one that has heard of them.
"""

import json
import secrets
import time

from torch._C._distributed_c10d import PrefixStore, Store

from megatron_moe.config.errors import PeerError

INVITATION = "start"
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5  # seconds between two looks


def meet(store: Store, rank: int, world_size: int, timeout_s: float) -> Store:
    """The part of the store that this start has for itself. Collective.

    Raises PeerError when the others do not come within timeout_s; DistError when the store itself is lost.
    """
    name = _invite(store, world_size) if rank == 0 else _answer(store, rank, timeout_s)
    return PrefixStore(name, store)


def _invite(store: Store, world_size: int) -> str:
    name = secrets.token_hex(8)
    store.set(INVITATION, name)
    # `get` waits, as long as the store was told to
    heard = [store.get(_seat(name, rank)).decode() for rank in range(1, world_size)]
    store.set(_list(name), json.dumps(heard))
    return name


def _answer(store: Store, rank: int, timeout_s: float) -> str:
    me, pause, deadline = secrets.token_hex(8), FIRST_PAUSE, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        # may be that of a start that is over: then the list of those it heard of is without me
        name = store.get(INVITATION).decode()
        store.set(_seat(name, rank), me)
        if store.check([_list(name)]) and json.loads(store.get(_list(name)))[rank - 1 : rank] == [me]:
            return name
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    raise PeerError(
        f"rank {rank} found no first rank within {timeout_s:.0f} s (--distributed-timeout-minutes); it has ended, or "
        f"never started: its log tells."
    )


def _seat(name: str, rank: int) -> str:
    return f"{name}/seat/{rank}"


def _list(name: str) -> str:
    return f"{name}/list"
