"""The rotation's rule by hand: which checkpoints may go, and which left-overs."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moe.checkpoint.catalogue import catalogue, last_change
from megatron_moe.checkpoint.inspection import inspect_checkpoint
from megatron_moe.checkpoint.rotate import REMOVED, discard, left_overs, remove_step, step_folder
from megatron_moe.checkpoint.storage import Storage
from megatron_moe.config.errors import NoCheckpointError, StorageError


@dataclass
class Pruning:
    """What is kept and what goes. broken: the steps that are not whole, which neither count nor go."""

    root: Path
    kept: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    stale: list[Path] = field(default_factory=list)
    in_use: list[Path] = field(default_factory=list)


def plan_pruning(root: Path, keep: int, stale_minutes: float | None) -> Pruning:
    """Keep the newest `keep` whose every checksum holds; of those beyond, the ones that look whole go.

    stale_minutes: left-overs that nobody has written to for so long go too; None leaves all but half-done removals.
    Raises NoCheckpointError when there are checkpoints and none is whole.
    """
    plan = Pruning(root)
    for entry in catalogue(root, "sizes"):
        problem = entry.problem
        if not problem and len(plan.kept) < keep:
            # sizes could lie: the only good one might be an older one
            problem = "; ".join(inspect_checkpoint(step_folder(root, entry.step), entry.step, "xxh3").problems[:3])
        if problem:
            plan.broken[entry.step] = problem
        elif len(plan.kept) < keep:
            plan.kept.append(entry.step)
        else:
            plan.removed.append(entry.step)
    if plan.broken and not plan.kept:
        listed = "\n".join(f"  step {step}: {problem}" for step, problem in plan.broken.items())
        raise NoCheckpointError(f"No checkpoint in {root} is whole; nothing is removed:\n{listed}")
    for path in left_overs(root):
        if path.name.endswith(REMOVED):
            plan.stale.append(path)  # a removal that was cut short
        elif stale_minutes is not None:
            idle = time.time() - last_change(path) >= 60 * stale_minutes
            (plan.stale if idle else plan.in_use).append(path)
    return plan


def prune(plan: Pruning, storage: Storage | None = None) -> None:
    """Carry it out. Raises StorageError naming what could not be removed, when all else is."""
    storage = storage or Storage()
    left = [str(step_folder(plan.root, step)) for step in plan.removed if not remove_step(storage, plan.root, step)]
    for path in plan.stale:
        discard(storage, path)
        left += [str(path)] if path.exists() else []
    if left:
        raise StorageError(f"could not be removed: {', '.join(left)}. Look at the permissions, and try again.")
