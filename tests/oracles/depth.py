"""mixture_of_depths: a block works for the best few tokens of each sequence."""

import math
from fractions import Fraction

from oracles.case import Case, Expected


def mixture_of_depths(case: Case) -> Expected:
    """The C tokens of a sequence with the largest r = w · x, weighed by r; or, in evaluation, all with r > 0."""
    found = Expected()
    scores = [sum(a * b for a, b in zip(token, case.parameters["weight"][0], strict=True)) for token in case.tokens]
    length = int(case.info["positions"].max()) + 1
    places = max(round(Fraction(str(case.options["capacity"])) * length), 1)
    chosen = set()
    for sequence in range(int(case.info["sequences"].max()) + 1):
        rows = [t for t in case.real_tokens() if case.info["sequences"][t] == sequence]
        chosen |= set(sorted(rows, key=lambda t: (-scores[t], case.info["positions"][t]))[:places])
    if case.train:
        share = predictor_loss(case, scores, chosen)
        found.losses["predictor_loss"] = (share, case.options["predictor_coeff"], "token")
    elif case.options["inference"] == "predictor":
        chosen = {t for t in case.real_tokens() if scores[t] > 0}
    found.pairs = {(t, 0): float(scores[t]) for t in chosen}
    return found


def predictor_loss(case: Case, scores: list[float], chosen: set[int]) -> float:
    """Σ over tokens of -ln of the chance that sigmoid(r) gives to what happened."""
    chance = {t: 1 / (1 + math.exp(-scores[t])) for t in case.real_tokens()}
    return -sum(math.log(chance[t] if t in chosen else 1 - chance[t]) for t in chance)
