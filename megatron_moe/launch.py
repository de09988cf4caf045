"""torchrun, with two things it lacks: it passes a stop signal on to the ranks, and ends with the ranks' exit code.

    python -m megatron_moe.launch --nproc-per-node 4 -m megatron_moe.pretrain --config recipe.toml

All of torchrun's options apply. torchrun itself ends with 1 whatever the ranks said, so that a scheduler cannot tell a
preempted run (75, requeue) from a wrong command line (2, do not).
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
# what torchrun may catch for itself: a terminal's interrupt, which reaches the ranks anyway
LEFT_TO_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"


def children(process: int) -> list[int]:
    """Direct children of a process (Linux)."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _forward(number: int, frame: FrameType | None) -> None:
    for child in children(os.getpid()):
        try:
            os.kill(child, number)
        except ProcessLookupError:
            continue  # it ended by itself meanwhile


def main(argv: Sequence[str]) -> int:
    """Start the ranks and wait for them; returns 0, or the exit code of the first rank that failed."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = LEFT_TO_TORCHRUN
    for number in FORWARDED:
        signal.signal(number, _forward)
    config, command, arguments = config_from_args(parse_args(list(argv)))
    if hasattr(config, "signals_to_handle"):
        config.signals_to_handle = LEFT_TO_TORCHRUN
    try:
        elastic_launch(config=config, entrypoint=command)(*arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # ranks that a dying peer took along die of signals: what a rank itself said counts first
        said = [code for code in codes if code > 0]
        return said[0] if said else 128 - codes[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
