"""Looks after checkpoint directories (those of --save): lists, verifies, compares, rewrites, prunes.

Examples:
    python tools/checkpoint.py ls runs/quickstart/checkpoint --hashes
    python tools/checkpoint.py verify runs/quickstart/checkpoint/step_00000300
    python tools/checkpoint.py diff runs/a/checkpoint runs/b/checkpoint/step_00000200
    python tools/checkpoint.py reshard runs/a/checkpoint runs/a/one-file --ranks 1
    python tools/checkpoint.py prune runs/a/checkpoint --keep 3 --stale --dry-run
    python tools/checkpoint.py upcycle runs/dense/checkpoint runs/sparse --num-experts 8 --moe-layer-freq 2

DIR is a checkpoint directory, STEP the folder of a step in it; where one step is needed, a directory means its newest
whole one. Exit codes: 0 well, 1 different (diff), 2 usage, 64 nothing valid, 65 damaged, 74 storage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_moe.checkpoint.catalogue import Entry, Place, catalogue, open_place
from megatron_moe.checkpoint.compare import differences
from megatron_moe.checkpoint.inspection import Inspection, inspect_checkpoint, raw_read_seconds
from megatron_moe.checkpoint.prune import plan_pruning, prune
from megatron_moe.checkpoint.rewrite import reshard
from megatron_moe.checkpoint.rotate import left_overs, step_folder, stored_steps
from megatron_moe.config.errors import CheckpointError, ConfigError, MegatronMoEError, NoCheckpointError
from megatron_moe.models.upcycle import upcycle

DIFFERENT = 1


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="the steps of a directory, and what --load latest would take")
    ls.add_argument("dir", type=Path, metavar="DIR")
    ls.add_argument("--hashes", action="store_true", help="read everything; without, manifests and sizes")
    verify = commands.add_parser("verify", help="every checksum of a step, or of all steps of a directory")
    verify.add_argument("place", type=Path, metavar="DIR|STEP")
    verify.add_argument("--sha256", action="store_true", help="the SHA-256 of each file that has one (--save-sha256)")
    verify.add_argument("--raw-read", action="store_true", help="read all once more without hashing, to compare speed")
    diff = commands.add_parser("diff", help="how two checkpoints differ; exit code 1 if they do")
    diff.add_argument("one", type=Path, metavar="A")
    diff.add_argument("two", type=Path, metavar="B")
    other = commands.add_parser("reshard", help="a step as if another number of ranks had saved it, bit for bit")
    other.add_argument("source", type=Path, metavar="SRC", help="directory or step")
    other.add_argument("target", type=Path, metavar="DST", help="directory that does not hold this step")
    other.add_argument("--ranks", type=int, required=True, metavar="N", help="1 makes one file for each part")
    old = commands.add_parser("prune", help="keep the newest whole checkpoints, remove older ones")
    old.add_argument("dir", type=Path, metavar="DIR")
    old.add_argument("--keep", type=int, required=True, metavar="K", help="how many whole ones stay, at least 1")
    old.add_argument(
        "--stale",
        type=float,
        nargs="?",
        const=60.0,
        metavar="MINUTES",
        help="also remove what cut-short saves left (*.tmp-*), if nobody wrote to it for so long; default 60",
    )
    old.add_argument("--dry-run", action="store_true", help="only say what would go")
    sparse = commands.add_parser("upcycle", help="a dense model as a sparse one of the same function, at step 0")
    sparse.add_argument("source", type=Path, metavar="SRC", help="directory or step of a dense model")
    sparse.add_argument("target", type=Path, metavar="DST", help="directory that holds no step 0")
    sparse.add_argument("--num-experts", type=int, required=True, metavar="E", help="copies of each dense layer")
    sparse.add_argument("--moe-router-topk", type=int, default=2, metavar="K", help="experts per token; default 2")
    sparse.add_argument("--moe-layer-freq", default="1", metavar="FREQ", help="which layers; default all")
    return parser


def list_steps(given: argparse.Namespace) -> int:
    """ls: a line for each step."""
    entries = catalogue(given.dir, "xxh3" if given.hashes else "sizes")
    for entry in entries:
        print(line_of(entry))
    for path in left_overs(given.dir):
        print(f"{path.name}: being written, or left by a save that was cut short")
    newest = next((entry for entry in entries if not entry.problem), None)
    if newest is None:
        raise NoCheckpointError(f"There is no valid checkpoint in {given.dir}: --load latest would find nothing.")
    proviso = "" if given.hashes else ", if its checksums hold (--hashes)"
    print(f"--load latest would take step {newest.step}{proviso}")
    return 0


def line_of(entry: Entry) -> str:
    """As: step 300  12.5 MB  valid  8 ranks, TP 2 x EP 2  run 1f3a  2.0 h old"""
    state = f"NOT VALID: {entry.problem}" if entry.problem else "valid"
    age = f"{entry.age_seconds / 3600:.1f} h old"
    known = [entry.layout, f"run {entry.run_id}"] if entry.run_id else []
    return "  ".join([f"step {entry.step}", f"{entry.num_bytes / 1e6:,.1f} MB", *known, age, state])


def verify_steps(given: argparse.Namespace) -> int:
    """verify: all that is wrong, then CheckpointError if anything is."""
    place = Place.of(given.place)
    steps = stored_steps(place.root) if place.step is None else [place.step]
    if not steps:
        raise NoCheckpointError(f"There is no checkpoint in {place.root}; check the path.")
    bad = []
    for step in steps:
        found = inspect_checkpoint(step_folder(place.root, step), step, "sha256" if given.sha256 else "xxh3")
        for problem in found.problems:
            print(f"{found.folder.name}: {problem}")
        for remark in [*found.remarks, *(without_sha256(found) if given.sha256 else [])]:
            print(f"{found.folder.name}: remark: {remark}")
        print(f"{found.folder.name}: {verdict(found, given.raw_read)}")
        bad += [step] if found.problems else []
    if bad:
        raise CheckpointError(f"{place.root}: damaged: {', '.join(f'step {step}' for step in bad)}.")
    return 0


def without_sha256(found: Inspection) -> list[str]:
    """What was compared in its place; nothing when all files have one."""
    count = len(found.manifest.without_sha256) if found.manifest else 0
    return [f"{count} files have no SHA-256 (--save-sha256): each piece's xxh3-128 was compared"] if count else []


def verdict(found: Inspection, raw_read: bool) -> str:
    """Good or not, and how fast that was found."""
    if found.manifest is None:
        return "damaged"
    speed = f"{found.num_bytes:,} bytes at {found.num_bytes / 1e9 / max(found.seconds, 1e-9):.2f} GB/s"
    if raw_read and not found.problems:
        raw = raw_read_seconds(found)
        speed += f", {raw / max(found.seconds, 1e-9):.2f} of the speed of reading alone"
    return f"{f'{len(found.problems)} problems' if found.problems else 'good'}; {speed}"


def show_differences(given: argparse.Namespace) -> int:
    """diff: a line for each."""
    one, two = open_place(given.one), open_place(given.two)
    count = 0
    for line in differences(one, two):
        print(line)
        count += 1
    print(f"{one.folder} and {two.folder}: {f'{count} differences' if count else 'equal'}")
    return DIFFERENT if count else 0


def rewrite(given: argparse.Namespace) -> int:
    """reshard: what was written."""
    reader = open_place(given.source)
    manifest = reshard(reader, given.target, given.ranks)
    print(
        f"step {reader.step} of {reader.folder.parent} is in {given.target} as {given.ranks} ranks write it: "
        f"{manifest.totals['tensors']:,} tensors in {len(manifest.files) - 3} files, {manifest.totals['bytes']:,} bytes"
    )
    return 0


def remove_old(given: argparse.Namespace) -> int:
    """prune: what stays, what goes."""
    if given.keep < 1:
        raise ConfigError(f"--keep {given.keep}: the last good checkpoint always stays; give 1 or more.")
    plan = plan_pruning(given.dir, given.keep, given.stale)
    print(f"kept: {', '.join(map(str, plan.kept)) or 'nothing there'}")
    for step, problem in plan.broken.items():
        print(f"left as it is, not whole: step {step}: {problem}")
    for path in plan.in_use:
        print(f"left as it is, may be being written: {path.name}")
    if not given.dry_run:
        prune(plan)
    for name in [*(f"step {step}" for step in plan.removed), *(path.name for path in plan.stale)]:
        print(f"{'would go' if given.dry_run else 'removed'}: {name}")
    return 0


def make_sparse(given: argparse.Namespace) -> int:
    """upcycle: what was written, and how to train on."""
    reader = open_place(given.source)
    moe = {"num_experts": given.num_experts, "router_topk": given.moe_router_topk, "layer_freq": given.moe_layer_freq}
    manifest = upcycle(reader, given.target, moe)
    config = step_folder(given.target, 0) / "config.json"
    print(
        f"wrote step 0 in {given.target}: {manifest.totals['elements']:,} weights, the dense model had "
        f"{sum(tensor.num_elements for tensor in reader.tensors['model'].values()):,}. "
        f"Train on with --config {config} --load {given.target} --finetune"
    )
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "ls": list_steps,
    "verify": verify_steps,
    "diff": show_differences,
    "reshard": rewrite,
    "prune": remove_old,
    "upcycle": make_sparse,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; every error is one paragraph."""
    given = build_parser().parse_args(argv)
    try:
        return COMMANDS[given.command](given)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
