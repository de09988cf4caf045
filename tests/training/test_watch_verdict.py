"""Who is to blame, from what each rank was last seen doing; what a record shows; who may talk to the server."""

import json
import socket
from dataclasses import replace
from typing import Any

import pytest

from megatron_moe.training.watch.beat import WINDOW, Beat, Record
from megatron_moe.training.watch.lines import Lines
from megatron_moe.training.watch.server import Server, Settings
from megatron_moe.training.watch.verdict import Limits, Seen, culprits, hung

NOW = 100.0
WAITING = Beat(progress=9, step=4, started=20, finished=19, waiting=1, section="step", axis="world", kind="barrier")
BUSY = replace(WAITING, waiting=0)


def ranks(*beats: Beat, **changes: Any) -> list[Seen]:
    return [Seen(rank, "h", 10 + rank, beat, heard_at=NOW, **changes) for rank, beat in enumerate(beats)]


def test_the_rank_for_which_the_others_wait_is_the_culprit() -> None:
    found, why = culprits(ranks(WAITING, BUSY, WAITING), NOW)
    assert [seen.rank for seen in found] == [1] and "has not reached the collective" in why


def test_of_several_that_do_not_wait_the_one_that_did_least_is_the_culprit() -> None:
    found, _ = culprits(ranks(WAITING, BUSY, replace(BUSY, started=18)), NOW)
    assert [seen.rank for seen in found] == [2]


def test_a_rank_in_another_collective_is_the_culprit() -> None:
    found, why = culprits(ranks(WAITING, WAITING, replace(WAITING, kind="all_reduce")), NOW)
    assert [seen.rank for seen in found] == [2] and "another collective" in why


def test_of_two_that_wait_the_one_that_left_out_a_call_is_the_culprit() -> None:
    found, why = culprits(ranks(replace(WAITING, started=19), WAITING), NOW)
    assert [seen.rank for seen in found] == [0] and "behind" in why


def test_a_stopped_process_and_a_silent_watcher_come_before_all() -> None:
    seen = ranks(WAITING, BUSY, WAITING)
    seen[2].state = "T"
    assert [each.rank for each in culprits(seen, NOW)[0]] == [2]
    seen[0].heard_at = None
    assert [each.rank for each in culprits(seen, NOW)[0]] == [0]


def test_who_has_left_is_no_culprit_and_all_are_where_nothing_tells_them_apart() -> None:
    seen = ranks(WAITING, WAITING, BUSY)
    seen[2].left = True
    found, why = culprits(seen, NOW)
    assert [each.rank for each in found] == [0, 1] and "same place" in why


@pytest.mark.parametrize(
    ("beat", "limits", "limit"),
    [
        (BUSY, Limits(8.0, 30.0, 5.0), 8.0),
        (WAITING, Limits(8.0, 30.0, 5.0), 5.0),
        (replace(WAITING, section="saving"), Limits(8.0, 30.0, 15.0), 15.0),
        (replace(BUSY, section="saving"), Limits(8.0, 30.0, 5.0), 30.0),
        (replace(BUSY, section="data"), Limits(8.0, 30.0, None), 8.0),
        (WAITING, Limits(None, None, 5.0), None),
    ],
)
def test_each_section_has_its_time(beat: Beat, limits: Limits, limit: float | None) -> None:
    assert limits.of(beat) == limit
    for late in (-0.1, 0.1):
        stalled = 1e9 if limit is None else limit + late
        assert bool(hung(ranks(beat, stalled_s=stalled), limits)) == (limit is not None and late > 0)


def test_a_record_shows_what_was_noted() -> None:
    record = Record()
    assert record.look() == Beat()
    record.enter("step")
    record.at_step(6)
    record.starts("ep", "all_to_all")
    record.waits()
    seen = record.look()
    assert (seen.section, seen.step, seen.axis, seen.kind, seen.started, seen.finished, seen.waiting) == (
        *("step", 6, "ep", "all_to_all"),
        *(1, 0, 1),
    )
    assert seen.where == "in step 7, section 'step', waiting in collective number 1 (all_to_all on ep)"
    record.arrived(0.25)
    assert record.look().waiting == 0 and record.look().finished == 1 and record.look().progress > seen.progress


def test_own_time_of_a_window_is_what_was_not_waiting() -> None:
    record = Record()
    for number in range(WINDOW):
        record.step_begins()
        record.waits()
        record.arrived(0.5)
        record.step_took(0.75 if number % 4 else 1.5)
    seen = record.look()
    assert (seen.window, seen.own_s, seen.spread_s) == (1, 0.25, 0.0)


def server(world_size: int) -> tuple[Server, socket.socket, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    listener = socket.create_server(("127.0.0.1", 0))
    settings = Settings(world_size, Limits(1.0, 1.0, None), None, None)
    return Server(settings, listener, "secret", told.append), listener, told


@pytest.mark.parametrize(
    "said",
    [
        b'{"token": "guess", "rank": 1, "died": "was killed"}\n',
        b'{"rank": 1, "died": "was killed"}\n',
        b'{"token": "secret", "rank": 7, "died": "was killed"}\n',
        b'{"token": "secret", "rank": "1", "died": "was killed"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b"",
    ],
)
def test_who_does_not_know_the_token_is_not_heard(said: bytes) -> None:
    found, listener, told = server(2)
    with socket.create_connection(listener.getsockname()) as stranger:
        found.serve(listener)
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        (_, connection) = found.sockets()
        found.serve(connection)
        assert stranger.recv(10) == b""
    assert told == [] and found.sockets() == [listener]
    listener.close()


def test_the_first_death_is_the_cause_and_late_comers_hear_of_it() -> None:
    found, listener, told = server(3)
    found.take(1, {"host": "h", "pid": 11, "died": "was killed by SIGKILL"})
    found.take(0, {"died": "was killed by SIGABRT"})
    assert [message["dead"].partition(",")[0] for message in told] == ["rank 1 (host h"]
    with socket.create_connection(listener.getsockname()) as late:
        found.serve(listener)
        late.sendall(json.dumps({"token": "secret", "rank": 2, "host": "h", "pid": 12}).encode() + b"\n")
        found.serve(found.sockets()[1])
        heard = Lines(late).receive()
        assert heard is not None and heard[0]["dead"].startswith("rank 1 (host h, pid 11) was killed by SIGKILL")
    for lines in found.sockets():
        lines.close()


def test_an_end_in_good_order_is_no_death() -> None:
    found, listener, told = server(3)
    for code in (0, 75, 86, 87):
        found.take(1, {"bye": code})
    assert told == []
    found.take(2, {"bye": 65})
    assert [message["grace"] for message in told] == [30.0]
    listener.close()
