"""What an oracle is given and what it answers: plain numbers, so that others can hold their own code to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One decision of one router, float64.

    fields: of [moe], router_type among them.   options: the router's own, with their defaults, as values.
    tokens (T, H); parameters and state by name; info: the arrays of TokenInfo (T,) by name.
    seed, step, layer: where random draws are keyed.
    """

    name: str
    fields: Mapping[str, Any]
    options: Mapping[str, Any]
    tokens: np.ndarray
    parameters: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray]
    info: Mapping[str, np.ndarray]
    num_groups: int
    train: bool
    seed: int = 1
    step: int = 0
    layer: int = 3
    vocab_size: int = 23
    expert_keys: np.ndarray | None = None  # (E, H), for routers that read them

    @property
    def num_experts(self) -> int:
        return int(self.fields["num_experts"])

    @property
    def topk(self) -> int:
        return int(self.fields.get("router_topk", 2))

    def real_tokens(self, group: int | None = None) -> list[int]:
        """Rows that are no padding, of one routing group or of all, in the order of their keys."""
        rows = [t for t in range(len(self.tokens)) if not self.info["is_padding"][t]]
        rows = [t for t in rows if group is None or self.info["groups"][t] == group]
        return sorted(rows, key=lambda t: (self.info["groups"][t], self.info["keys"][t]))


@dataclass
class Expected:
    """pairs: (token, expert) -> weight.   losses: name -> (Σ of the unit's values, coefficient, unit)."""

    pairs: dict[tuple[int, int], float] = field(default_factory=dict)
    losses: dict[str, tuple[float, float, str]] = field(default_factory=dict)
