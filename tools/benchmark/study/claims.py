"""Differences with their intervals over seeds, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# two-sided 95% quantiles of Student's t by degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and the half-width of its 95% interval; None from a single seed."""

    mean: float
    half_width: float | None
    seeds: int

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.mean:+.3f} (one seed)"
        return f"{self.mean:+.3f} ± {self.half_width:.3f}"


def paired(mine: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """mine - other over the seeds that both have; None without any."""
    seeds = sorted(set(mine) & set(other))
    if not seeds:
        return None
    gaps = [mine[seed] - other[seed] for seed in seeds]
    return Difference(statistics.fmean(gaps), _half_width(gaps), len(gaps))


def _half_width(gaps: Sequence[float]) -> float | None:
    if len(gaps) < 2:
        return None
    quantile = T_QUANTILES[min(len(gaps) - 2, len(T_QUANTILES) - 1)]
    return quantile * statistics.stdev(gaps) / math.sqrt(len(gaps))


def verdict(found: Difference | None, *, smallest: float) -> str:
    """Whether "mine is lower" was seen. smallest: the smallest difference that would matter, in nats.

    seen: the whole interval is below zero.   not seen: the interval excludes an advantage of `smallest`.
    underpowered: it could be either.
    """
    if found is None or found.half_width is None:
        return "underpowered"
    if found.mean + found.half_width < 0:
        return "seen"
    if found.mean - found.half_width > -smallest:
        return "not seen"
    return "underpowered"
