"""Lays a run out over a world of any size in this process, on no memory, and checks every rank before any GPU is asked.

Examples:
    python tools/dry_run.py --recipe examples/st_moe/st_moe_32b.toml --world-size 1024
    python tools/dry_run.py --recipe recipe.toml --world-size 64 --tensor-model-parallel-size 4 --json plan.json

Further flags are those of a training run and override the recipe.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_moe.config.errors import ConfigError, MegatronMoEError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.whole_file import write_whole
from megatron_moe.config.world import check_world
from megatron_moe.planning.dry_run import Report, dry_run
from megatron_moe.training.engine import grid_of
from megatron_moe.training.validate import validate

GIGA = 1e9


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="a recipe, or a saved configuration")
    parser.add_argument("--world-size", type=int, required=True, help="ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    return parser.parse_known_args(arguments)


def text(report: Report) -> str:
    """Markdown."""
    grid, coverage = report.grid, report.coverage
    axes = {name: getattr(grid, name) for name in ("tp", "cp", "pp", "dp", "ep", "etp", "edp")}
    lines = [
        f"{grid.world_size} ranks: " + ", ".join(f"{name} {size}" for name, size in axes.items()),
        f"{coverage.parameters:,} parameters in {coverage.tensors} logical tensors:",
        *(f"    {part}: {number:,}" for part, number in report.by_formula.items()),
        f"{coverage.pieces:,} rectangles of all ranks make {coverage.copies:,} whole copies of tensors",
        f"{report.transfers} tensors pass through each pipeline in a step",
        "",
        "| layers | parameters of a rank | weights GB | gradients GB | optimizer GB | together GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stage in report.stages:
        sizes = (stage.weights, stage.gradients, stage.optimizer, stage.memory)
        cells = [stage.layers, f"{stage.parameters:,}", *(f"{size / GIGA:.2f}" for size in sizes)]
        lines.append("| " + " | ".join(cells) + " |")
    names = sorted({name for stage in report.stages for name in stage.sent})
    lines += ["", "Sent by a rank in a step, MB:", "", "| layers | " + " | ".join(names) + " |"]
    lines.append("| --- " * (len(names) + 1) + "|")
    for stage in report.stages:
        cells = [f"{stage.sent.get(name, 0) / 1e6:,.1f}" for name in names]
        lines.append("| " + " | ".join([stage.layers, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every rank fits the others, 1 when one does not."""
    given, flags = parse(arguments)
    started = time.perf_counter()
    try:
        config = RunConfig.load(["--config", str(given.recipe), *flags])
        if config.model.vocab_size is None:
            raise ConfigError("the recipe leaves the vocabulary to the tokenizer; give its size with --vocab-size.")
        check_world(config, given.world_size)
        validate(config)
        report = dry_run(config, grid_of(config, given.world_size), config.model.vocab_size)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(text(report))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGA
    print(f"\n{len(report.problems)} problems; {time.perf_counter() - started:.1f} s, {peak:.2f} GB")
    for problem in report.problems[:20]:
        print(f"problem: {problem}", file=sys.stderr)
    if given.json:
        write_whole(given.json, json.dumps(asdict(report), indent=1))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
