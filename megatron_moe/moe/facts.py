"""What a way of routing says of itself in the list of routers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One line of tools/list_routers.py; each word is short, for it stands in a table.

    batch_independent: no other sequence of the batch changes a token's experts, without a capacity and with routing
    groups of one sample.   losses: the router's own, with the default of its coefficient, beside the balance and z
    losses that MoEConfig weighs.   example: fields of [moe], beside router_type, for a small model of four experts:
    what the checks of the list begin with, and whoever wants to try this way of routing.
    """

    paper: str  # "Switch, arXiv:2101.03961"
    chooses: str  # "token", "expert", "joint", "nobody", "block", "soft"
    batch_independent: bool
    scores: str  # "softmax before the choice", "softmax after it", "sigmoid", "none"
    weights: str  # "raw score", "sum to 1", "1"
    capacity: str  # the paper's convention: "T/E · CF", "dropless", "exactly T·c/E"
    losses: tuple[str, ...] = ()  # "balance 0.01"
    good_for: str
    example: Mapping[str, Any] = field(default_factory=dict)
