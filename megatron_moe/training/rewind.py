"""Where a run goes back to after a spike, some way before it, to pass over the samples that led there.  [PaLM 5.1]"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from megatron_moe.checkpoint.load import CheckpointReader, all_stored_steps, find_checkpoint
from megatron_moe.parallel.state import Axis
from megatron_moe.training.resume import fill_from_newest


def way_back(root: Path, spike: int, distance: int, world: Axis, device: torch.device) -> int | None:
    """The newest stored step at least `distance` before step `spike`, else the oldest; None if there is none.

    spike: counted from 1; the checkpoint of a step has it done.  Collective.
    """
    steps = [step for step in all_stored_steps(root, world, device) if step < spike]
    old_enough = [step for step in steps if step <= spike - distance]
    return next(iter(old_enough or steps[-1:]), None)


def fill_back(
    root: Path, step: int, world: Axis, device: torch.device, fill: Callable[[CheckpointReader], None]
) -> None:
    """Fill a run from the checkpoint of `step`, or an older one if that is broken. Collective.

    Raises NoCheckpointError if none is whole; the run is then neither here nor there, and must end.
    """

    def find(damaged: Mapping[int, str]) -> CheckpointReader:
        return find_checkpoint(root, None, world, check="on_read", device=device, damaged=damaged, at_most=step)

    fill_from_newest(find, fill)
