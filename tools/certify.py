"""Trains a tiny model on many layouts and prints how far each is from one process: loss, gradients, weights.

In float64, on ranks forked on this machine over gloo; a layout keeps the promise below 1e-9.

Examples:
    python tools/certify.py
    python tools/certify.py --family encoder-decoder --router st_moe
    python tools/certify.py --router my_router.py:MyRouter --json certificate.json
    python tools/certify.py --router st_moe --moe expert_capacity_factor=1.25 expert_bias=additive
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_moe.certify.certificate import Row, Subject, certify
from megatron_moe.config.errors import ConfigError, MegatronMoEError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import settings_of
from megatron_moe.config.values import parse as parse_value
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


def moe_fields(router: str, more: Sequence[str]) -> dict[str, Any]:
    """[moe] of the router's own example, and what was given as name=value."""
    found = example_fields(router)
    known = settings_of(MoEConfig)
    for pair in more:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--moe {pair}: expected name=value, the name one of {', '.join(known)}.")
        kind = known[name].kind
        if kind is dict:
            raise ConfigError(f"--moe {pair}: give the router's own options with --router-options name=value ...")
        found[name] = {"true": True, "false": False}.get(text, text) if kind is bool else parse_value(kind, text)
    return found


def subject_of(family: str, moe: Mapping[str, Any]) -> Subject:
    """The router in every stack of the family."""
    if family == "decoder-only":
        return Subject(moe)
    encoder = {name: value for name, value in moe.items() if name not in OF_THE_DECODER}
    return Subject(moe, FAMILIES[family], encoder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--router", default="top_k", help="a name of tools/list_routers.py, or path/to/file.py:Class")
    parser.add_argument("--router-options", nargs="*", default=[], metavar="NAME=VALUE", help="the router's own")
    parser.add_argument("--moe", nargs="*", default=[], metavar="NAME=VALUE", help="further fields of [moe]")
    parser.add_argument("--family", choices=list(FAMILIES), default="decoder-only", help="which kind of model")
    parser.add_argument("--max-ranks", type=int, default=8, help="leave out layouts of more ranks")
    parser.add_argument("--quick", action="store_true", help="layouts of at most two ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    return parser.parse_args(arguments)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| layout | loss | auxiliary losses | gradient norm | gradients | weights |", "| --- " * 6 + "|"]
    for row in rows:
        cells = [f"refused: {row.refused}"] if row.refused else [f"{error:.1e}" for error in row.errors.values()]
        lines.append("| " + " | ".join([row.layout, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every layout that can run equals one process, 1 when one differs."""
    given = parse(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        moe = moe_fields(given.router, given.moe)
        options = dict(pair.split("=", 1) for pair in given.router_options)
        moe["router_options"] = {**moe.get("router_options", {}), **options}
        rows = certify(subject_of(given.family, moe), max_ranks=2 if given.quick else given.max_ranks)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(rows))
    worst = max((row.max_relative_error or 0.0) for row in rows)
    print(f"\n{given.router}: worst relative error {worst:.1e}, {time.perf_counter() - started:.0f} s")
    if given.json:
        found = [{**asdict(row), "max_relative_error": row.max_relative_error} for row in rows]
        given.json.write_text(json.dumps({"router": given.router, "moe": moe, "rows": found}, indent=1))
    return 0 if all(row.equal for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
