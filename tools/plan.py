"""Says what a run will cost before it runs: a pipeline schedule drawn, with its idle share and its memory.

Examples:
    python tools/plan.py --show-schedule 1f1b --pipeline-ranks 4 --microbatches 8
    python tools/plan.py --show-schedule interleaved --pipeline-ranks 4 --microbatches 8 --rounds 2 --costs 1,2,1
    python tools/plan.py --show-schedule zb_h1 --pipeline-ranks 8 --microbatches 32 --png zb_h1.png
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from megatron_moe.config.errors import ConfigError, MegatronMoEError
from megatron_moe.pipeline.actions import Pipeline
from megatron_moe.pipeline.schedule import Costs, Number, Schedule
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.planning.drawing import draw_picture, draw_text
from megatron_moe.planning.simulate import Timeline, simulate

DRAWN = {**SCHEDULES, forward_only.name: forward_only}
MOST_LISTED = 16  # ranks whose memory is listed one by one
GROUPED = ("interleaved", forward_only.name)


def show_schedule(options: argparse.Namespace) -> list[str]:
    """Lines of text about the schedule that was asked for; writes the picture too.

    Raises ConfigError for a shape that is none, or that the schedule has no order for.
    """
    schedule = DRAWN.get(options.show_schedule)
    if schedule is None:
        raise ConfigError(f"--show-schedule {options.show_schedule}: expected one of {', '.join(DRAWN)}")
    shape, costs = shape_of(options), costs_of(options)
    latency = time_of("--latency", options.latency)
    check_effect(schedule, shape, options)
    try:
        lists = schedule(shape)
    except ValueError as error:
        at_fault = f"--group {shape.group}" if schedule.many_rounds else f"--rounds {shape.rounds}"
        raise ConfigError(f"{at_fault}: {error}") from None
    timeline = simulate(lists, shape, costs, latency=latency)
    if options.png:
        draw_picture(timeline, shape, title(schedule, shape, timeline), Path(options.png))
    return [
        title(schedule, shape, timeline),
        "",
        *draw_text(timeline, shape, options.width or shutil.get_terminal_size((120, 24)).columns),
        "",
        *facts(schedule, shape, costs, timeline, latency),
    ]


def shape_of(options: argparse.Namespace) -> Pipeline:
    numbers = {
        "--pipeline-ranks": options.pipeline_ranks,
        "--microbatches": options.microbatches,
        "--rounds": options.rounds,
        "--group": 1 if options.group is None else options.group,
        "--width": 1 if options.width is None else options.width,
    }
    for flag, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{flag} {number}: expected 1 or more")
    return Pipeline(options.pipeline_ranks, options.microbatches, options.rounds, options.group)


def check_effect(schedule: Schedule, shape: Pipeline, options: argparse.Namespace) -> None:
    """Raises ConfigError for an option that changes nothing."""
    if shape.group is not None and (shape.rounds == 1 or schedule.name not in GROUPED):
        raise ConfigError(
            f"--group {shape.group} changes nothing here; it does with --rounds 2 or more of {' and '.join(GROUPED)}"
        )
    if options.overlap is not None and not schedule.pairs(shape):
        raise ConfigError(f"--overlap {options.overlap}: this pipeline has no pairs of passes; '1f1b_overlap' has")


def costs_of(options: argparse.Namespace) -> Costs:
    parts = options.costs.split(",")
    if len(parts) != 3:
        raise ConfigError(f"--costs {options.costs}: expected three times, as in 1,1,1 for F,I,W")
    forward, backward_input, backward_weight = (time_of("--costs", part) for part in parts)
    if not forward:
        raise ConfigError(f"--costs {options.costs}: a forward pass takes some time; expected more than 0")
    overlap = time_of("--overlap", options.overlap or "1")
    if overlap > 1:
        raise ConfigError(f"--overlap {options.overlap}: expected a share from 0 to 1")
    return Costs(forward, backward_input, backward_weight, overlap)


def time_of(flag: str, text: str) -> Number:
    """Exact, so that the simulation is; an integer where it is one, which is faster."""
    try:
        time = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{flag} {text}: expected a number, as in 1 or 0.85") from None
    if time < 0:
        raise ConfigError(f"{flag} {text}: expected 0 or more")
    return time.numerator if time.denominator == 1 else time


def title(schedule: Schedule, shape: Pipeline, timeline: Timeline) -> str:
    rounds = f", {shape.rounds} rounds" if shape.rounds > 1 else ""
    waits = f"{percent(timeline.idle_share)} idle"
    return f"{schedule.name}: {shape.ranks} ranks{rounds}, {shape.microbatches} microbatches, {waits}"


def facts(schedule: Schedule, shape: Pipeline, costs: Costs, timeline: Timeline, latency: Number) -> list[str]:
    """Time beside its formula, and memory."""
    formula = percent(schedule.idle_share(shape, costs))
    without = " without latency" if latency else ""
    held = [schedule.held(shape, rank) for rank in range(shape.ranks)]
    if len(set(held)) == 1:
        told = f"{held[0]} on each rank"
    elif len(held) <= MOST_LISTED:
        told = ", ".join(map(str, held))
    else:
        told = f"{held[0]} on rank 0, down to {held[-1]} on rank {len(held) - 1}"
    passes = "passes of a microbatch through a stage" if shape.rounds > 1 else "microbatches"
    return [
        f"time        {number(timeline.total)}",
        f"idle share  {percent(timeline.idle_share)} simulated, {formula} by the formula{without}",
        f"bubble      {schedule.bubble}, a rank on average",
        f"memory      most {passes} whose activations are held: {told}",
    ]


def percent(share: Number) -> str:
    return f"{100 * float(share):.2f} %"


def number(value: Number) -> str:
    return f"{float(value):g}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[2:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--show-schedule", metavar="NAME", help=f"draw a pipeline schedule: {', '.join(DRAWN)}")
    form = parser.add_argument_group("the schedule")
    form.add_argument("--pipeline-ranks", type=int, default=4, metavar="P", help="default 4")
    form.add_argument("--microbatches", type=int, default=8, metavar="M", help="of a step, on each rank; default 8")
    form.add_argument("--rounds", type=int, default=1, metavar="V", help="stages of each rank; default 1")
    form.add_argument(
        "--group", type=int, metavar="G", help="microbatches that pass a stage before a rank's next one; default: P"
    )
    form.add_argument(
        "--costs",
        default="1,1,1",
        metavar="F,I,W",
        help="times of a stage: forward pass, input half and weight half of the backward pass; default 1,1,1",
    )
    form.add_argument(
        "--overlap",
        metavar="SHARE",
        help="of a pair's shorter pass that the longer one hides; default 1: the pair takes as long as the longer",
    )
    form.add_argument("--latency", default="0", metavar="TIME", help="of what one rank sends to another; default 0")
    form.add_argument("--width", type=int, metavar="COLUMNS", help="of the drawing; default: the terminal's")
    form.add_argument("--png", metavar="FILE", help="draw a picture too; needs matplotlib")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    try:
        print("\n".join(show_schedule(options)))
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
