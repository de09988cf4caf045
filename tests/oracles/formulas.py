"""Softmax, order and losses by loops, as the papers write them."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from oracles.case import Case, Expected


def softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def best(values: Sequence[float], count: int) -> list[int]:
    """Places of the largest, best first; of equals the first."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]


def logits_of(case: Case, tokens: np.ndarray | None = None) -> list[list[float]]:
    """(T, E)."""
    rows = case.tokens if tokens is None else tokens
    weight = case.parameters["weight"]
    return [[float(np.dot(row, weight[e])) for e in range(len(weight))] for row in rows]


def balance_loss(
    case: Case, scores: Sequence[Sequence[float]], choices: Callable[[int], list[int]], convention: str
) -> float:
    """Σ over groups of E Σ f P.   choices(t): the experts of token t before any policy, best first."""
    total = 0.0
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        if not rows:
            continue
        for expert in range(case.num_experts):
            counted = [choices(t)[:1] if convention == "first_choice" else choices(t) for t in rows]
            share = sum(expert in chosen for chosen in counted) / len(rows)
            if convention == "normalised":
                share /= len(choices(rows[0]))
            total += case.num_experts * share * sum(scores[t][expert] for t in rows) / len(rows)
    return total


def z_loss(case: Case, logits: Sequence[Sequence[float]]) -> float:
    """Σ over real tokens of the squared log of the sum of exponentials."""
    return sum(math.log(sum(math.exp(value) for value in logits[t])) ** 2 for t in case.real_tokens())


def add_losses(
    expected: Expected,
    case: Case,
    logits: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    choices: Callable[[int], list[int]] | None,
    convention: str = "first_choice",
) -> None:
    """The two losses that [moe] weighs; none in evaluation."""
    balance, z = case.fields.get("aux_loss_coeff", 0.0), case.fields.get("z_loss_coeff", 0.0)
    if case.train and balance and choices is not None:
        found = balance_loss(case, scores, choices, convention)
        expected.losses["load_balance_loss"] = (found, balance, "group")
    if case.train and z:
        expected.losses["z_loss"] = (z_loss(case, logits), z, "token")
