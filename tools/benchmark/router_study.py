"""The router study: every way of routing at equal active FLOPs, and what was seen, not seen or underpowered.

Runs are kept in a ledger that any machine can extend; a run that is there is not repeated. Seeds are paired: with the
same seed every model sees the same text in the same order.

Examples:
    python -m tools.benchmark.router_study --smoke
    python -m tools.benchmark.router_study --size tiny --seeds 0 1 2 --jobs 2 --ledger my_ledger.jsonl
    python -m tools.benchmark.router_study --report --ledger my_ledger.jsonl --output study.md --picture study.png
    python -m tools.benchmark.router_study --size tiny --only switch --router my_router.py:MyRouter
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config.errors import ConfigError, MegatronMoEError
from megatron_moe.config.whole_file import write_whole
from tools.benchmark.study.arms import SIZES, TABLES, arms_of, main_arms, memory_arms, sparse
from tools.benchmark.study.ledger import add, key_of, read, same
from tools.benchmark.study.run import Arm, Size, run
from tools.benchmark.study.tables import claims, grid_table, main_table, memory_table, newest, picture
from tools.benchmark.study.text import Text, load_text

LEDGER = Path(__file__).parent / "results" / "router_study.jsonl"
Job = tuple[Arm, Size, int]


def waiting(jobs: Sequence[Job], ledger: Path, text: Text) -> list[Job]:
    """Those that the ledger does not hold yet."""
    lines = read(ledger)
    return [job for job in jobs if not any(same(line, key_of(*job, text.fingerprint)) for line in lines)]


def work(job: Job, ledger: Path) -> tuple[str, int, float, float]:
    """One run, in a process of its own with one thread."""
    torch.set_num_threads(1)
    arm, size, seed = job
    text = load_text()
    key = key_of(arm, size, seed, text.fingerprint)
    started = time.perf_counter()
    line = add(ledger, key, run(arm, size, seed, text))
    return arm.name, seed, line["loss"], time.perf_counter() - started


def work_all(jobs: Sequence[Job], ledger: Path, processes: int) -> None:
    """In `processes` at a time."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        pending = [pool.apply_async(work, (job, ledger)) for job in jobs]
        for number, answer in enumerate(pending, start=1):
            name, seed, loss, seconds = answer.get()
            print(f"[{number}/{len(jobs)}] {name}, seed {seed}: {loss:.4f} nats per byte, {seconds:.0f} s", flush=True)


def render(ledger: Path, size: Size) -> str:
    """All tables of one size, as Markdown."""
    lines = read(ledger)
    arms = newest(lines, size.name)
    if not arms:
        raise ConfigError(f"{ledger} holds no run of size {size.name}; run the study without --report first.")
    tables = {line["table"] for line in lines}
    by_table = {table: newest([line for line in lines if line["table"] == table], size.name) for table in tables}
    names = [arm.name for arm in main_arms(size)]
    others = [name for name in by_table.get("main", {}) if name not in names]
    text = next(line for line in lines if line["size"]["name"] == size.name)
    parts = [
        f"# Router study, size {size.name}\n",
        f"{text['size']}, text {text['text']}, bigram model {text['bigram']:.3f} nats per byte.\n",
        "## Causal methods beside a dense model of the same active FLOPs\n",
        main_table(by_table.get("main", {}), [*names, *others]),
        "## Methods that see later tokens (their losses are not those of a language model)\n",
        main_table({**by_table.get("leaking", {}), **_only(arms, "dense")}, names),
        "## SAM: experts activated by experts, one width of expert\n",
        grid_table(arms, "", [f"E={e}" for e in (8, 16, 32, 64)], [f"k={k}" for k in (1, 2, 4, 8)], "{row} {column}"),
        "## Memory: block size by way of choosing, the same number of active cells\n",
        memory_table(by_table.get("memory", {}), [arm.name for arm in memory_arms(size)]),
        "## Claims\n",
        claims(arms),
    ]
    return "\n".join(parts)


def _only(arms: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: arms[name]} if name in arms else {}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--smoke", action="store_true", help="every arm for a few steps: does all of it run?")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="which models, and for how long")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), help="which comparisons")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms only")
    parser.add_argument("--router", metavar="PATH.py:CLASS", help="a router of your own, as a further arm")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="the file of all runs")
    parser.add_argument("--report", action="store_true", help="train nothing, show what the ledger holds")
    parser.add_argument("--output", type=Path, help="write the tables there as well")
    parser.add_argument("--picture", type=Path, help="draw the losses there")
    return parser.parse_args(arguments)


def chosen_jobs(given: argparse.Namespace) -> list[Job]:
    """All runs that were asked for."""
    size = SIZES["smoke" if given.smoke else given.size]
    arms = arms_of(given.tables, size)
    if given.router:
        arms.append(Arm(given.router, "main", sparse(given.router, size.ffn)))
    if given.only:
        known = {arm.name for arm in arms}
        unknown = [name for name in given.only if name not in known]
        if unknown:
            raise ConfigError(f"--only {unknown[0]}: there is no such arm; there are {', '.join(sorted(known))}.")
        arms = [arm for arm in arms if arm.name in given.only or arm.name == given.router]
    return [(arm, size, seed) for seed in ([0] if given.smoke else given.seeds) for arm in arms]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parse(arguments)
    try:
        size = SIZES["smoke" if given.smoke else given.size]
        if not given.report:
            jobs = waiting(chosen_jobs(given), given.ledger, load_text())
            work_all(jobs, given.ledger, given.jobs)
        shown = render(given.ledger, size)
        if given.picture:
            picture(newest(read(given.ledger), size.name), given.picture)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(shown)
    if given.output:
        write_whole(given.output, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
