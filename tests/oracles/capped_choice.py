"""ec_cap: expert choice with at most b experts for a token, by the dual of the program with entropy."""

from fractions import Fraction

import numpy as np
from oracles.case import Case, Expected
from oracles.formulas import add_losses, best, logits_of, softmax


def ec_cap(case: Case) -> Expected:
    """Each expert takes the C tokens that are largest in its row of the program's solution."""
    found = Expected()
    logits = logits_of(case)
    scores = [softmax(row) for row in logits]
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        if not rows:
            continue
        exact = Fraction(str(case.options["capacity"])) * len(rows) / case.num_experts
        takes = min(max(round(exact) if case.options["rounding"] == "round" else int(exact), 1), len(rows))
        # a small group may have too few tokens for all those places
        cap = max(case.options["cap"], -(-takes * case.num_experts // len(rows)))
        log_shares = solved(np.array([scores[t] for t in rows]).T, takes, cap, case.options)
        chosen = [set(best(row.tolist(), takes)) for row in log_shares]
        if case.options["strict_cap"]:
            strictly_capped(log_shares, chosen, takes, cap)
        found.pairs |= {(rows[j], e): scores[rows[j]][e] for e, places in enumerate(chosen) for j in places}
    add_losses(found, case, logits, scores, None)
    return found


def solved(scores: np.ndarray, takes: int, cap: int, options: dict[str, float]) -> np.ndarray:
    """(E, T): S + a + u, lambda · ln A but for the bound at 1.   scores: (E, T).

    a of all rows for given u, then u of all columns for given a, and so on, as often as the paper iterates.
    """
    strength = options["entropy"]
    row_price, column_price = np.zeros((len(scores), 1)), np.zeros((1, scores.shape[1]))
    for _ in range(int(options["iterations"])):
        before = column_price
        row_price = level((scores + column_price) / strength, takes)[:, None] * strength
        column_price = np.minimum(0.0, level((scores + row_price).T / strength, cap)[None] * strength)
        if np.abs(column_price - before).max() <= 1e-3 * strength:
            break
    return scores + row_price + column_price


def level(values: np.ndarray, total: int) -> np.ndarray:
    """The x of each row at which the sum of min(1, exp(value + x)) is `total`, by bisection."""
    most = -values.min(axis=1)  # all are 1
    least = -values.max(axis=1) - np.log(values.shape[1])  # the sum is at most 1
    for _ in range(50):
        middle = (most + least) / 2
        enough = np.exp(np.minimum(0.0, values + middle[:, None])).sum(axis=1) >= total
        most, least = np.where(enough, middle, most), np.where(enough, least, middle)
    return most


def strictly_capped(wishes: np.ndarray, chosen: list[set[int]], takes: int, cap: int) -> None:
    """Take from each token what is over its cap, least wished first, then fill the experts up again, in place.

    Place by place the expert with the fewest tokens takes the free token that it wishes most. If it has all of these,
    another expert takes the free one that it wishes most, and gives one that it lacks: the exchange of largest sum.
    """
    experts, tokens = range(len(wishes)), range(wishes.shape[1])
    for j in tokens:
        holders = sorted((e for e in experts if j in chosen[e]), key=lambda e: (-wishes[e, j], e))
        for e in holders[cap:]:
            chosen[e].remove(j)
    while min(len(held) for held in chosen) < takes:
        poorest = min(experts, key=lambda e: (len(chosen[e]), e))
        free = [j for j in tokens if sum(j in held for held in chosen) < cap]
        wanted = [j for j in free if j not in chosen[poorest]]
        if wanted:
            chosen[poorest].add(max(wanted, key=lambda j: wishes[poorest, j]))
            continue
        freed = max(free, key=lambda j: wishes[poorest, j])
        exchanges = [
            (wishes[poorest, j] - wishes[e, j] + wishes[e, freed], e, j)
            for e in experts
            if freed not in chosen[e]
            for j in chosen[e] - chosen[poorest]
        ]
        _, other, given = max(exchanges)
        chosen[poorest].add(given)
        chosen[other].remove(given)
        chosen[other].add(freed)
