"""Copies on several ranks that are no copies any more: found before they are learnt from, or saved.

When: after the gradients are summed and before anything is updated. So a bit that flipped while the step used the
weights is seen, and the update that it spoilt is not made.
What cannot be seen: numbers that only one rank holds (ZeRO shards of what has no other axis of replicas), even once
they are gathered by all; and a flipped bit that is overwritten before a check comes: weights that each step gathers
(ZeRO-1) or casts from masters are seen in all steps only with an interval of 1.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_moe.checkpoint.messages import gather_to_all
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.config.errors import ConfigError, ReplicaError
from megatron_moe.parallel.bit_hash import bit_hash
from megatron_moe.parallel.copies import Copy, differing, dissent, with_others
from megatron_moe.parallel.state import ParallelState

# of many tensors that differ, so many are told
TOLD = 10


@dataclass(frozen=True)
class ReplicaCheck:
    """Compares what `copies` returns over the ranks, every `interval` steps; None: never.

    Making one is collective, if there is an interval; raises ConfigError on all ranks when there is nothing to compare.
    """

    interval: int | None
    copies: Callable[[], list[Copy]]
    state: ParallelState
    device: torch.device

    def __post_init__(self) -> None:
        if self.interval is None:
            return
        mine = torch.tensor(len(with_others(self.copies(), self.state)), device=self.device)
        if not int(self.state.world.comm.all_reduce_(mine, "max")):
            raise ConfigError(
                f"--check-replicas-interval {self.interval} has no effect: no rank of this layout holds numbers that "
                f"another one holds too; leave it out."
            )

    def check(self, step: int, last_checkpoint: str | None, *, suspect: bool) -> None:
        """Raises ReplicaError on all ranks if any copies differ in step `step`, counted from 1. Collective.

        suspect: something else is wrong in this step, the same on all ranks; then it is checked whether due or not.
        """
        if self.interval is None or (step % self.interval and not suspect):
            return
        held = with_others(self.copies(), self.state)
        found, mine = differing(held, self.state, self.device)
        if found:
            raise ReplicaError(self._report(held, mine, step, last_checkpoint))

    def _report(self, held: list[Copy], mine: list[str], step: int, last_checkpoint: str | None) -> str:
        world = self.state.world
        names = {name for text in gather_to_all("\n".join(mine), world, self.device) for name in text.splitlines()}
        told = [
            (block.name, block.offset, block.shape, f"{int(bit_hash(block.tensor)):x}")
            for copy in held
            if copy.name in names
            for block in copy.blocks()
        ]
        problems = _problems(gather_to_all(json.dumps(told), world, self.device))
        more = f"\n... and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        kept = last_checkpoint or "none in this run yet"
        return (
            f"step {step}: " + "\n".join(problems[:TOLD]) + f"{more}\nReplicas have drifted apart (a faulty device or "
            f"memory, or a missing gradient sum). This step has updated nothing. The last good checkpoint: {kept}. "
            f"Start again from it with --load, without the machines of the ranks that differ."
        )


def _problems(told: list[str]) -> list[str]:
    """One sentence for each rectangle that its holders do not hold alike. told: by each rank, as JSON."""
    hashes: dict[tuple[str, Rectangle], dict[int, str]] = {}
    for rank, text in enumerate(told):
        for name, offset, shape, found in json.loads(text):
            hashes.setdefault((name, Rectangle(tuple(offset), tuple(shape))), {})[rank] = found
    words = {place: dissent(by_rank) for place, by_rank in sorted(hashes.items(), key=lambda item: str(item[0]))}
    return [
        f"tensor '{name}' {rectangle} should be the same on all its holders, but {said}"
        for (name, rectangle), said in words.items()
        if said
    ]
