"""Layouts by rule: every axis alone, every pair of axes, and more of them at a time, on up to eight ranks."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.certify.layouts import COMM, CP, EP, ETP, LAYOUTS, PP, ROUNDS, TP, ZERO_3, Layout
from megatron_moe.certify.tiny_model import GLOBAL_BATCH

MOST_RANKS = 8
FEWEST_LAYERS = 4  # of a model that is certified


@dataclass(frozen=True)
class Choice:
    """One value of one axis: fields of [parallel], how many times the ranks of all others, samples in a microbatch."""

    name: str
    parallel: Mapping[str, Any] = field(default_factory=dict)
    copies: int = 1
    micro_batch_size: int = 1


# the first value of each is the plain one; "DP 2" doubles the ranks that the others need, so EP 2 x DP 2 has EDP 2
SPLITTING: dict[str, tuple[Choice, ...]] = {
    "tensor": (
        Choice("TP 2", {TP: 2}),
        Choice("TP 2 without sequence parallelism", {TP: 2, "sequence_parallel": False}),
    ),
    "pipeline": (Choice("PP 2", {PP: 2}), Choice("PP 4", {PP: 4})),
    "context": (
        Choice("CP 2", {CP: 2}),
        Choice("CP 4", {CP: 4}),
        Choice("CP 2 by a ring", {CP: 2, COMM: "p2p"}),
        Choice("CP 2 by all-to-all", {CP: 2, COMM: "a2a"}),
    ),
    "expert": (Choice("EP 2", {EP: 2}), Choice("EP 4", {EP: 4})),
    "expert tensor": (Choice("ETP 2", {ETP: 2}), Choice("ETP 1", {ETP: 1})),
    "data": (
        Choice("DP 2", copies=2),
        Choice("DP 2 without ZeRO-1", {"use_distributed_optimizer": False}, copies=2),
        Choice("DP 2 with ZeRO-3", ZERO_3, copies=2),
    ),
}
TIMING: dict[str, tuple[Choice, ...]] = {
    "micro-batch": (Choice("micro-batches of 2", micro_batch_size=2),),
    "schedule": (
        Choice("split backward", {"pipeline_schedule": "1f1b_split"}),
        Choice("sequential", {"pipeline_schedule": "sequential"}),
        Choice("ZB-H1", {"pipeline_schedule": "zb_h1"}),
        Choice("interleaved", {"pipeline_schedule": "interleaved", ROUNDS: 2}),
    ),
    "recomputation": (
        Choice("recomputation", {"recompute_granularity": "full"}),
        Choice("recomputation of attention", {"recompute_granularity": "selective"}),
    ),
}
AXES = {**SPLITTING, **TIMING}
EXTENTS = ("quick", "default", "full")


def combine(choices: Sequence[Choice]) -> Layout | None:
    """On as few ranks as hold them; None if one of them changes nothing there, or if they are too many."""
    parallel = {name: value for choice in choices for name, value in choice.parallel.items()}
    tp, pp, cp, ep = (int(parallel.get(name, 1)) for name in (TP, PP, CP, EP))
    etp = int(parallel.get(ETP, tp))
    if (ETP in parallel and etp == tp) or ("pipeline_schedule" in parallel and pp == 1):
        return None
    if ROUNDS in parallel and pp * int(parallel[ROUNDS]) > FEWEST_LAYERS:
        return None
    if pp > 1 and ZERO_3.items() <= parallel.items():
        return None
    stage = math.lcm(tp * cp, ep * etp) * math.prod(choice.copies for choice in choices)
    micro = math.prod(choice.micro_batch_size for choice in choices)
    layout = Layout(pp * stage, parallel, micro)
    fits = layout.ranks <= MOST_RANKS and stage // (tp * cp) * micro <= GLOBAL_BATCH
    return layout if fits else None


def combinations(axes: Iterable[Sequence[Choice]], sizes: Iterable[int]) -> dict[str, Layout]:
    """Every legal layout of so many of the axes at a time, one value of each, by name."""
    axes = list(axes)
    found = {}
    for size in sizes:
        for some in itertools.combinations(axes, size):
            for choices in itertools.product(*some):
                layout = combine(choices)
                if layout is not None:
                    found[_name(choices)] = layout
    return found


def _name(choices: Sequence[Choice]) -> str:
    of_ranks = {choice.name for values in SPLITTING.values() for choice in values}
    splits = " x ".join(choice.name for choice in choices if choice.name in of_ranks)
    return ", ".join([*([splits] if splits else []), *(c.name for c in choices if c.name not in of_ranks)])


def layouts(extent: str) -> dict[str, Layout]:
    """Those of LAYOUTS first, then those made by rule that are none of them.

    quick: the plain values of every pair, on at most four ranks.   default: every pair, and the plain values of three
    and four of the axes that split.   full: up to four of all axes at a time, every value.
    """
    plain = [values[:1] for values in AXES.values()]
    if extent == "quick":
        made = {name: layout for name, layout in combinations(plain, (2,)).items() if layout.ranks <= 4}
        special = {name: layout for name, layout in LAYOUTS.items() if layout.ranks <= 2}
    elif extent == "default":
        made = combinations(AXES.values(), (1, 2)) | combinations(plain[: len(SPLITTING)], (3, 4))
        special = LAYOUTS
    else:
        made, special = combinations(AXES.values(), (1, 2, 3, 4)), LAYOUTS
    known = {_identity(layout) for layout in special.values()}
    # a special one of that name has microbatches of another size
    new = {f"{name}, one sample each" if name in special else name: each for name, each in _new(made, known).items()}
    return {**special, **new}


def _new(made: Mapping[str, Layout], known: set[Any]) -> dict[str, Layout]:
    """Each layout once."""
    found = {}
    for name, layout in made.items():
        if _identity(layout) not in known:
            known = known | {_identity(layout)}
            found[name] = layout
    return found


def _identity(layout: Layout) -> tuple[Any, ...]:
    """What two layouts that are the same have in common: fields at their defaults say nothing."""
    tp = layout.parallel.get(TP, 1)
    defaults = {ETP: tp, "sequence_parallel": tp > 1, "use_distributed_optimizer": True, "pipeline_schedule": "1f1b"}
    said = sorted((name, str(value)) for name, value in layout.parallel.items() if value != defaults.get(name))
    return layout.ranks, layout.micro_batch_size, layout.uneven, tuple(said)
