"""The three ways of attention over cut sequences beside each other, on gloo ranks of this machine.

One attention core, forwards and backwards: seconds until the slowest rank is done (median of rounds in which the ways
take turns), CPU time of a rank, the most memory beside inputs and gradients of the inputs, what is kept for the
backward pass, and bytes that leave a rank. Last columns: over keys and values gathered from all ranks.

Examples:
    python tools/benchmark/context_parallel.py
    python tools/benchmark/context_parallel.py --ranks 4 --seq-length 4096 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_moe.config.errors import ConfigError, MegatronMoEError
from megatron_moe.layers.attention_core import Sight
from megatron_moe.layers.attention_cores import CORES
from megatron_moe.layers.context_parallel import context_rows
from megatron_moe.models.whole import plain_context
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.launch import fork_ranks
from megatron_moe.parallel.state import Axis, ParallelState
from tools.benchmark.timing import saved_bytes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """One attention layer."""

    length: int  # of the whole sequence
    samples: int
    groups: int
    per_group: int
    width: int


@dataclass(frozen=True)
class Line:
    """What one way costs a rank, or the slowest of several."""

    way: str
    causal: bool
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    kept_bytes: int
    sent_bytes: int


def inputs_of(shape: Shape, cp: Axis) -> tuple[list[Tensor], Sight]:
    """Random queries, keys and values of this rank's rows, and a sight of the whole sequence that is not causal."""
    view = plain_context(torch.zeros(shape.samples, shape.length, dtype=torch.int64)).view
    view = replace(view, rows=context_rows(shape.length, cp.size, cp.rank, CPU))
    generator = torch.Generator().manual_seed(cp.rank)
    keys = (view.num_rows, shape.samples, shape.groups, shape.width)
    sizes = ((*keys[:3], shape.per_group, shape.width), keys, keys)
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes], Sight(view, view, causal=False)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call holds at once, above what was there before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda change: change.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def both_ways(way: str, causal: bool, shape: Shape, cp: Axis) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """A forward pass, and one with its backward pass, of this rank's rows."""
    inputs, sight = inputs_of(shape, cp)
    core = CORES[way](cp)

    def forward() -> Tensor:
        query, key, value = inputs
        return core(query, key, value, replace(sight, causal=causal))

    return forward, lambda: torch.autograd.grad(forward().sum(), inputs)


def sent_bytes(way: str, causal: bool, shape: Shape, cp: Axis) -> int:
    """By a rank that keeps a record only."""
    state, tallies = ParallelState.recorded(Grid(cp.size, cp=cp.size), cp.rank)
    both_ways(way, causal, shape, state.cp)[1]()
    return sum(tallies["cp"].sent_bytes.values())


def lines_of_rank(rank: int, ranks: int, shape: Shape, rounds: int) -> list[Line]:
    """Every way on this rank; all ranks call alike."""
    cp = ParallelState.distributed(Grid(ranks, cp=ranks)).cp
    found = []
    for causal in (True, False):
        calls = {way: both_ways(way, causal, shape, cp) for way in CORES}
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in CORES}
        for turn in range(rounds + 1):
            for way in sorted(CORES, key=lambda name: (list(CORES).index(name) + turn) % len(CORES)):
                cp.comm.barrier()
                start, cpu = time.perf_counter(), time.process_time()
                calls[way][1]()
                mine = time.process_time() - cpu
                cp.comm.barrier()
                times[way].append((time.perf_counter() - start, mine))
        for way, (forward, whole) in calls.items():
            seconds, cpu_seconds = (statistics.median(column) for column in zip(*times[way][1:], strict=True))
            found.append(
                Line(
                    way,
                    causal,
                    seconds,
                    cpu_seconds,
                    peak_bytes(whole),
                    saved_bytes(forward, []),
                    sent_bytes(way, causal, shape, cp),
                )
            )
    return found


def measured(shape: Shape, ranks: int, rounds: int) -> list[Line]:
    """The slowest and largest of all ranks."""
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; the children use none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        answers = fork_ranks(ranks, lines_of_rank, shape, rounds)
    numbers = ("seconds", "cpu_seconds", "peak_bytes", "kept_bytes", "sent_bytes")
    return [
        replace(parts[0], **{name: max(getattr(part, name) for part in parts) for name in numbers})
        for parts in zip(*answers, strict=True)
    ]


def table(lines: Sequence[Line], given: argparse.Namespace) -> str:
    """Markdown."""
    text = [
        f"{given.ranks} ranks, S {given.seq_length}, B {given.samples}, {given.heads} heads in {given.groups} groups "
        f"of width {given.head_dim}, float32, one thread each.\n",
        "| pattern | way | ms | CPU ms | peak MiB | kept MiB | sent MiB | time ratio | CPU ratio | peak ratio |",
        "|" + "---|" * 10,
    ]
    for line in lines:
        base = next(one for one in lines if one.causal == line.causal and one.way == "all_gather")
        sizes = [f"{size / 2**20:.2f}" for size in (line.peak_bytes, line.kept_bytes, line.sent_bytes)]
        ratios = [
            f"{mine / theirs:.2f}"
            for mine, theirs in (
                (line.seconds, base.seconds),
                (line.cpu_seconds, base.cpu_seconds),
                (line.peak_bytes, base.peak_bytes),
            )
        ]
        times = [f"{seconds * 1e3:.1f}" for seconds in (line.seconds, line.cpu_seconds)]
        text.append("| " + " | ".join(["causal" if line.causal else "full", line.way, *times, *sizes, *ratios]) + " |")
    return "\n".join(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, default=2, help="that share a sequence, all on this machine")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2, help="of key-value heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more runs before them")
    parser.add_argument("--json", action="store_true", help="a list of lines instead of a table")
    return parser.parse_args(arguments)


def check(given: argparse.Namespace) -> Shape:
    """Raises ConfigError."""
    ranks, heads, groups = given.ranks, given.heads, given.groups
    for name in ("samples", "groups", "head_dim", "rounds"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(given, name)}: expected an integer of at least 1.")
    if ranks < 2:
        raise ConfigError(f"--ranks {ranks}: one rank cuts nothing; use 2 or more.")
    if given.seq_length < 1 or given.seq_length % (2 * ranks):
        raise ConfigError(f"--seq-length {given.seq_length}: expected a multiple of 2 x --ranks {ranks}.")
    if heads < 1 or heads % ranks or heads % groups:
        raise ConfigError(f"--heads {heads}: expected a multiple of --ranks {ranks} and of --groups {groups}.")
    return Shape(given.seq_length, given.samples, groups, heads // groups, given.head_dim)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parse(arguments)
    # forked ranks cannot share a pool of threads
    torch.set_num_threads(1)
    try:
        lines = measured(check(given), given.ranks, given.rounds)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps([asdict(line) for line in lines], indent=2) if given.json else table(lines, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
