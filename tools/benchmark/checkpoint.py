"""Saving and loading a checkpoint against the disk itself, and against what else a user would take.

Ranks are forked; each holds its share of the experts' tensors and of the optimizer's state (ZeRO-1 shards: flat ranges,
cut across tensors): `many` small tensors, `few` large ones, or `usual` ones, as experts have them. In every round all
ways run once, in an order that turns, and a ratio compares two ways of one round: other load on the machine hits both.
Files are dropped from the page cache before each load, and what is loaded goes into memory that is there already. All
are float32.

    write raw      os.write of the same bytes from one stretch of memory in pieces of 32 MiB, and fsync
    read raw       preadv of the same bytes into one stretch of memory in pieces of 8 MiB
    copy           the same bytes from one stretch of memory to another that was touched before
    save           CheckpointWriter.save in the foreground: written, synced, checked, renamed
    save, sha256   the same with --save-sha256
    save, no hash  the same with all hashes replaced by constants
    background     save in the background, to the end;  stall: until the step goes on, with memory kept from a save
                   before;  first stall: with a new writer that was not given the time to prepare, and must first
                   get that memory from the system
    load           find_checkpoint and fill_all, as a run is resumed: hashes verified while reading
    load, no hash  the same without verification
    verify         find_checkpoint with all hashes before anything is read, as tools take it, and then fill_all
    safetensors, dcp    save_file and load_file of a rank's tensors, and torch.distributed.checkpoint. The former does
                   not sync by itself, so its file is synced after. torch.save pickles, which no file here may do
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config.whole_file import write_whole
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.launch import fork_ranks
from megatron_moe.parallel.state import ParallelState
from tools.benchmark.checkpoint_ways import Share, Ways
from tools.benchmark.results import machine, surroundings

SHAPES = {"many": (128, 128), "usual": (1024, 1024), "few": (4096, 4096)}  # 64 KiB, 4 MiB, 64 MiB
# name: (dividend, divisor), both seconds of one round
RATIOS = {
    "save speed / raw write": ("write raw", "save"),
    "save speed with sha256 / raw write": ("write raw", "save, sha256"),
    "background save speed / raw write": ("write raw", "background"),
    "load speed / raw read": ("read raw", "load"),
    "stall / copy": ("stall", "copy"),
    "first stall / copy": ("first stall", "copy"),
    "save with / without hashes": ("save", "save, no hash"),
    "load with / without hashes": ("load", "load, no hash"),
    "safetensors save_file / save": ("save safetensors", "save"),
    "dcp.save / save": ("save dcp", "save"),
    "safetensors load_file / load": ("load safetensors", "load"),
    "dcp.load / load": ("load dcp", "load"),
}


def on_rank(
    rank: int, ranks: int, folder: str, shape: tuple[int, int], num_bytes: int, rounds: int, peers: bool
) -> list[dict[str, float]]:
    """One round does not count; then the seconds of each way in each round."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    gc.freeze()  # as pretrain does
    state = ParallelState.alone() if ranks == 1 else ParallelState.distributed(Grid(ranks))
    ways = Ways(Share(rank, ranks, shape, num_bytes), state, Path(folder))
    return [ways.round(turn, peers) for turn in range(rounds + 1)][1:]


def slowest(found: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """found[rank][round][way] -> seconds of the slowest rank in each round."""
    return [{way: max(rank[way] for rank in ranks) for way in ranks[0]} for ranks in zip(*found, strict=True)]


def summary(rounds: Sequence[Mapping[str, float]], num_bytes: int) -> dict[str, Any]:
    """Medians and spreads: seconds and GB/s of each way, and the ratios, each of one round."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}

    ways = {way: spread([found[way] for found in rounds]) for way in rounds[0]}
    return {
        "seconds": ways,
        "gb_per_s": {way: num_bytes / 1e9 / found["median"] for way, found in ways.items()},
        "ratios": {
            name: spread([found[above] / found[below] for found in rounds])
            for name, (above, below) in RATIOS.items()
            if above in rounds[0] and below in rounds[0]
        },
    }


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="of all ranks together; default 512")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="R", help="forked; default 1 2 4")
    parser.add_argument("--tensors", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="default all")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that does not; default 5")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default a temporary one")
    parser.add_argument("--no-peers", action="store_true", help="leave out safetensors and dcp")
    parser.add_argument("--output", type=Path, metavar="JSON", help="where the figures go")
    parser.add_argument("--label", default="", help="what a reader must know of the conditions")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the ratios; writes all figures."""
    given = build_parser().parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"format": 1, "date": datetime.now(UTC).isoformat(timespec="seconds"), "label": given.label}
    found["machine"] = machine(torch.device("cpu")) | surroundings(Path(__file__).resolve().parents[2])
    found["megabytes"], found["rounds"], found["cases"] = given.megabytes, given.rounds, []
    for ranks, kind in itertools.product(given.ranks, given.tensors):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            size = given.megabytes * 10**6
            times = slowest(
                fork_ranks(ranks, on_rank, folder, SHAPES[kind], size, given.rounds, not given.no_peers, timeout_s=3600)
            )
        case = {"ranks": ranks, "tensors": kind, "load_average": round(os.getloadavg()[0], 2)}
        found["cases"].append(case | summary(times, size) | {"rounds": times})
        _show(found["cases"][-1])
        if given.output:
            write_whole(given.output, json.dumps(found, indent=1) + "\n")
    return 0


def _show(case: Mapping[str, Any]) -> None:
    print(f"{case['ranks']} ranks, {case['tensors']} tensors, load {case['load_average']}")
    for way, speed in case["gb_per_s"].items():
        print(f"  {way:24} {case['seconds'][way]['median'] * 1e3:9.1f} ms {speed:8.2f} GB/s")
    for name, ratio in case["ratios"].items():
        print(f"  {name:36} {ratio['median']:7.2f}  ({ratio['lowest']:.2f} to {ratio['highest']:.2f})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
