"""What lies in a Megatron checkpoint and is not read, with the reason; all else has to be a tensor of the model."""

from __future__ import annotations

import re

IGNORED = (
    (r"(.*\.)?_extra_state\d*(/.*)?", "extra state of Transformer Engine (FP8 scales)"),
    (r"(optimizer|chained_\d+\.optimizer|chained_\d+)\..*", "optimizer state"),
    (r"optimizer", "optimizer state"),
    (r"rng_state(/.*)?", "states of random generators"),
    (r"rerun_state_machine_state(/.*)?", "state of the rerun machine"),
    (r".*\.mlp\.router\.local_tokens_per_expert", "a counter"),
)


def why_ignored(name: str) -> str | None:
    """None for what has to be a tensor of the model."""
    return next((reason for pattern, reason in IGNORED if re.fullmatch(pattern, name)), None)
