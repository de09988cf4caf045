"""Gloo ranks for tests: forked from the test process, so that eight of them start in a fifth of a second."""

import warnings
from collections.abc import Callable
from typing import Any

from megatron_moe.parallel.launch import fork_ranks


def run_on_ranks(world_size: int, check: Callable[..., Any], *arguments: Any) -> list[Any]:
    """check(rank, world_size, *arguments) on every rank; returns the answers, plain values, in rank order."""
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; the children use none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        return fork_ranks(world_size, check, *arguments, timeout_s=1000.0)
