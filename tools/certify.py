"""Trains a tiny model on many layouts and prints how far each is from one process: loss, gradients, weights.

On ranks forked on this machine. In float64 a layout keeps the promise below 1e-9; in a narrower type below twice what
the order of the sums alone is worth, which is measured first (megatron_moe/certify/spread.py).

Examples:
    python tools/certify.py
    python tools/certify.py --family all --full --json certificate.json
    python tools/certify.py --recipe examples/st_moe/recipe.toml
    python tools/certify.py --router my_router.py:MyRouter --quick
    python tools/certify.py --router st_moe --moe expert_capacity_factor=1.25 expert_bias=additive --dtype bf16
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe.certify.certificate import KINDS, Row, Subject, certify, check_where
from megatron_moe.certify.combinations import layouts
from megatron_moe.certify.shrink import shrink
from megatron_moe.certify.tiny_run import TOLERANCE, Where
from megatron_moe.config.errors import ConfigError, MegatronMoEError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import settings_of
from megatron_moe.config.values import parse as parse_value
from megatron_moe.config.whole_file import write_whole
from megatron_moe.moe.methods import find_method
from megatron_moe.report.router_list import example_fields

FAMILIES: dict[str, dict[str, Any]] = {
    "decoder-only": {},
    "encoder-decoder": {
        "encoder_num_layers": 4,
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
    },
}
OF_THE_DECODER = ("allow_noncausal", "consistency_coeff", "consistency_cross_entropy", "aux_layer_reduction")
LOSSES = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}
DTYPES = {"float64": "fp64", "float32": "fp32", "bf16": "bf16"}


def more_fields(pairs: Sequence[str]) -> dict[str, Any]:
    """Fields of [moe] given as name=value."""
    found: dict[str, Any] = {}
    known = settings_of(MoEConfig)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--moe {pair}: expected name=value, the name one of {', '.join(known)}.")
        kind = known[name].kind
        if kind is dict:
            raise ConfigError(f"--moe {pair}: give the router's own options with --router-options name=value ...")
        found[name] = {"true": True, "false": False}.get(text, text) if kind is bool else parse_value(kind, text)
    return found


def moe_fields(router: str, more: Sequence[str]) -> dict[str, Any]:
    """[moe] of the router's own example, with the losses that it knows, and what was given as name=value."""
    unused = find_method(router).unused_fields
    losses = {name: value for name, value in LOSSES.items() if name not in unused}
    return {**losses, **example_fields(router), **more_fields(more)}


def subject_of(family: str, moe: Mapping[str, Any]) -> Subject:
    """The router in every stack of the family."""
    if family == "decoder-only":
        return Subject(moe)
    encoder = {name: value for name, value in moe.items() if name not in OF_THE_DECODER}
    return Subject(moe, FAMILIES[family], encoder)


def subjects(given: argparse.Namespace) -> dict[str, Subject]:
    """What is certified, by family. Raises ConfigError."""
    options = dict(pair.split("=", 1) for pair in given.router_options)
    if given.recipe is not None:
        if given.router is not None or given.family is not None:
            flag = "--router" if given.router is not None else "--family"
            raise ConfigError(f"{flag} with --recipe: the recipe says that; leave one of them out.")
        fields = more_fields(given.moe)
        shrunk = shrink(given.recipe, {**fields, **({"router_options": options} if options else {})})
        print(f"{given.recipe}, made tiny:", *(f"    {line}" for line in shrunk.lines), sep="\n")
        family = "encoder-decoder" if "encoder_num_layers" in shrunk.subject.model else "decoder-only"
        return {family: shrunk.subject}
    moe = moe_fields(given.router or "top_k", given.moe)
    moe["router_options"] = {**moe.get("router_options", {}), **options}
    wanted = list(FAMILIES) if given.family == "all" else [given.family or "decoder-only"]
    return {family: subject_of(family, moe) for family in wanted}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="certify this model, made tiny")
    parser.add_argument("--router", help="a name of tools/list_routers.py, or path/to/file.py:Class; default top_k")
    parser.add_argument("--router-options", nargs="*", default=[], metavar="NAME=VALUE", help="the router's own")
    parser.add_argument("--moe", nargs="*", default=[], metavar="NAME=VALUE", help="further fields of [moe]")
    parser.add_argument("--family", choices=[*FAMILIES, "all"], help="which kind of model; default decoder-only")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="pairs of axes, on at most four ranks")
    extent.add_argument("--full", action="store_true", help="every legal pair, triple and quadruple of axes")
    parser.add_argument("--max-ranks", type=int, default=8, help="leave out layouts of more ranks")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float64", help="what the model computes in")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the ranks compute")
    parser.add_argument(
        "--backend", choices=("gloo", "nccl"), default="gloo", help="how they talk; over gloo they may share a card"
    )
    parser.add_argument("--brief", action="store_true", help="one table: the worst figure of each layout, by family")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    return parser.parse_args(arguments)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| layout | loss | auxiliary losses | gradient norm | gradients | weights |", "| --- " * 6 + "|"]
    if rows and rows[0].tolerances:
        lines.append("| *allowed* | " + " | ".join(f"*{rows[0].tolerances[kind]:.1e}*" for kind in KINDS) + " |")
    for row in rows:
        cells = [f"refused: {row.refused}"] if row.refused else [f"{row.errors[kind]:.1e}" for kind in KINDS]
        lines.append("| " + " | ".join([row.layout, *cells]) + (" |" if row.equal else " | DIFFERS |"))
    return "\n".join(lines)


def brief(rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: a row a layout, a column for the worst figure of each family."""
    cells: dict[str, dict[str, str]] = {}
    for family, found in rows.items():
        for row in found:
            worst = "cannot run" if row.refused else f"{row.max_relative_error:.1e}"
            cells.setdefault(row.layout, {})[family] = worst if row.equal else f"{worst} DIFFERS"
    lines = [f"| layout | {' | '.join(rows)} |", "| --- " * (len(rows) + 1) + "|"]
    for layout, figures in cells.items():
        lines.append(f"| {layout} | {' | '.join(figures.get(family, '-') for family in rows)} |")
    return "\n".join(lines)


def as_json(row: Row, family: str, dtype: str) -> dict[str, Any]:
    found = {"family": family, "dtype": dtype, **asdict(row)}
    return {**found, "equal": row.equal, "max_relative_error": row.max_relative_error}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every layout that can run equals one process, 1 when one differs."""
    given = parse(arguments)
    torch.set_num_threads(1)
    where = Where(given.device, given.backend)
    extent = "quick" if given.quick else "full" if given.full else "default"
    found: list[dict[str, Any]] = []
    by_family: dict[str, list[Row]] = {}
    started = time.perf_counter()
    try:
        max_ranks = check_where(where, given.max_ranks)
        wanted = {name: replace(one, dtype=DTYPES[given.dtype]) for name, one in subjects(given).items()}
        for family, subject in wanted.items():
            begun = time.perf_counter()
            rows = certify(subject, layouts(extent), max_ranks=max_ranks, where=where)
            by_family[family] = rows
            found += [as_json(row, family, given.dtype) for row in rows]
            shown = "" if given.brief else f"\n{table(rows)}\n\n"
            print(f"{shown}{_summary(given, family, rows)}, {time.perf_counter() - begun:.0f} s", flush=True)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if given.brief:
        print(f"\n{brief(by_family)}")
    if given.json:
        facts = {**_facts(given, wanted), "seconds": time.perf_counter() - started}
        write_whole(given.json, json.dumps({**facts, "rows": found}, indent=1))
    return 0 if all(row["equal"] for row in found) else 1


def _summary(given: argparse.Namespace, family: str, rows: Sequence[Row]) -> str:
    worst = max((row.max_relative_error or 0.0) for row in rows)
    refused = sum(row.refused is not None for row in rows)
    differ = sum(not row.equal for row in rows)
    allowed = f"allowed {TOLERANCE:.0e}" if given.dtype == "float64" else "allowed as the first line says"
    what = given.recipe or given.router or "top_k"
    return (
        f"{what}, {family}, {given.dtype}: {len(rows)} layouts, {differ} differ, {refused} cannot run; "
        f"worst relative error {worst:.1e}, {allowed}"
    )


def _facts(given: argparse.Namespace, wanted: Mapping[str, Subject]) -> dict[str, Any]:
    """What the rows are of."""
    return {
        "recipe": None if given.recipe is None else str(given.recipe),
        "router": given.router or (None if given.recipe else "top_k"),
        "moe": dict(next(iter(wanted.values())).moe),
        "subjects": {family: asdict(subject) for family, subject in wanted.items()},
        "dtype": given.dtype,
        "device": given.device,
        "backend": given.backend,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
