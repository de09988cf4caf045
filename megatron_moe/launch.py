"""torchrun, with two things it lacks: it passes a stop signal on to the ranks, and ends with the ranks' exit code.

    python -m megatron_moe.launch --nproc-per-node 4 -m megatron_moe.pretrain --config recipe.toml

All of torchrun's options apply. torchrun itself ends with 1 whatever the ranks said, so that a scheduler cannot tell a
preempted run (75, requeue) from a wrong command line (2, do not).   With --max-restarts, ranks that end with 93 (no
progress) are started again as well, and end with 93 again before they build anything.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

FORWARDED = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
)  # ranks have sessions of their own: no terminal reaches them
LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"
PREEMPTED = 75
PEER_DIED = 86


def children(process: int) -> list[int]:
    """Direct children of a process (Linux)."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _forward(number: int, frame: FrameType | None) -> None:
    ranks = children(os.getpid())
    if not ranks:
        raise SystemExit(PREEMPTED)  # nothing has started, nothing is lost
    for child in ranks:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            continue  # it ended by itself meanwhile


def main(argv: Sequence[str]) -> int:
    """Start the ranks and wait for them; returns 0, or the exit code of the first rank that failed."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = LEFT_TO_TORCHRUN
    for number in FORWARDED:
        signal.signal(number, _forward)
    arguments = parse_args(list(argv))
    arguments.signals_to_handle = LEFT_TO_TORCHRUN
    # one thread a process, as torchrun would set it, without its warning
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        run(arguments)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        said = [failure.exitcode for failure in failures if failure.exitcode > 0]
        # what the first rank said counts; a rank that only lost its peer, or died of a signal with it, is no cause
        causes = [code for code in said if code != PEER_DIED] or said
        return causes[0] if causes else 128 - failures[0].exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
