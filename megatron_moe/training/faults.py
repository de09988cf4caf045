"""Numbers that are none: found on every rank in the same step, before anything is updated."""

import math

import torch

from megatron_moe.config.errors import NonFiniteError
from megatron_moe.parallel.state import Axis


def check_finite(
    loss: float,
    grad_norm: float,
    local_is_finite: bool,
    step: int,
    world: Axis,
    device: torch.device,
    last_checkpoint: str | None,
    found: str = "",
) -> None:
    """Raises NonFiniteError on every rank when the step's loss or gradient norm, the same on all, is NaN or infinite.

    local_is_finite: whether this rank's own share of the loss was; the error names the ranks where it was not.
    found: what more is known, in whole sentences.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    mine = torch.tensor([int(not local_is_finite)], dtype=torch.int64, device=device)
    flags = world.comm.all_gather(mine, [1] * world.size).tolist()
    ranks = [rank for rank, bad in zip(world.ranks, flags, strict=True) if bad]
    where = f"the loss of rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else "a gradient"
    kept = f"The last good checkpoint is {last_checkpoint}" if last_checkpoint else "No checkpoint has been written yet"
    raise NonFiniteError(
        f"step {step}: {where} is not finite (loss {loss}, gradient norm {grad_norm}); nothing was updated. "
        f"{found + ' ' if found else ''}{kept}. "
        f"Resume from it with --load, lower --lr or --clip-grad, or look at the samples of this step."
    )
