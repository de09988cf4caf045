"""torchrun, with two things it lacks: it passes a stop signal on to the ranks, and ends with the ranks' exit code.

    python -m megatron_moe.launch --nproc-per-node 4 -m megatron_moe.pretrain --config recipe.toml

All of torchrun's options apply. torchrun itself ends with 1 whatever the ranks said, so that a scheduler cannot tell a
preempted run (75, requeue) from a wrong command line (2, do not). And where it was given --max-restarts, it would start
ranks again that ended because it was asked to stop.

With --max-restarts, ranks that end with 2, 64, 65 or 93 by themselves are started again as well, and end with the same
code again before the first step.
"""

import os
import signal
import sys
import time
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
LEFT_ALONE_S = 60.0  # as `srun --wait` of examples/launch/slurm.sbatch


def children(process: int) -> list[int]:
    """Direct children of a process (Linux)."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def verdict(codes: Sequence[int]) -> int:
    """The exit code of a job from those of its ranks, first to end first; negative ones are signals' numbers."""
    said = [code for code in codes if code > 0]
    # what the first rank said counts; a rank that only lost its peer, or died of a signal with it, is no cause
    causes = [code for code in said if code != PEER_DIED] or said
    return causes[0] if causes else next((128 - code for code in codes if code), 0)


class Stop:
    """What the launcher does when it is signalled: hands the signal on, and ends with what the ranks end with.

    torchrun would start them again, for all it knows they failed.
    """

    def __init__(self) -> None:
        self._codes: dict[int, int] = {}  # of ranks that ended, in that order; kept over a second signal

    def __call__(self, number: int, frame: FrameType | None) -> None:
        ranks = children(os.getpid())
        for child in ranks:
            try:
                os.kill(child, number)
            except ProcessLookupError:
                continue  # it ended by itself meanwhile
        # a second signal comes here again, out of this wait
        self._wait(set(ranks))
        raise SystemExit(verdict(list(self._codes.values())) if self._codes else PREEMPTED)

    def _wait(self, ranks: set[int]) -> None:
        """Until all have ended; one that is left alone for too long waits for the dead, and is killed."""
        late: float | None = None
        while ranks:
            for child in sorted(ranks):
                code = _ended(child)
                if code is not None:
                    self._codes[child] = code
                    ranks.remove(child)
                    late = late or time.monotonic() + LEFT_ALONE_S
            if late is not None and time.monotonic() > late:
                for child in ranks:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.02)


def _ended(child: int) -> int | None:
    """Its exit code, or the negative number of the signal that ended it; None while it runs."""
    try:
        found, status = os.waitpid(child, os.WNOHANG)
    except ChildProcessError:
        return PEER_DIED  # torchrun waited for it first, and alone knows
    return os.waitstatus_to_exitcode(status) if found else None


def main(argv: Sequence[str]) -> int:
    """Start the ranks and wait for them; returns 0, or the exit code of the first rank that failed."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = LEFT_TO_TORCHRUN
    stop = Stop()
    for number in FORWARDED:
        signal.signal(number, stop)
    arguments = parse_args(list(argv))
    arguments.signals_to_handle = LEFT_TO_TORCHRUN
    # one thread a process, as torchrun would set it, without its warning
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        run(arguments)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        return verdict([failure.exitcode for failure in failures])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
