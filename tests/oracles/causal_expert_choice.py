"""expert_choice_position and expert_choice_threshold: experts choose, and no token competes with its own future."""

from fractions import Fraction

from oracles.case import Case, Expected
from oracles.formulas import add_losses, logits_of, softmax


def expert_choice_position(case: Case) -> Expected:
    """Each expert takes the tokens at a position, of the sequences of a group, that prefer it most."""
    found = Expected()
    logits = logits_of(case)
    scores = [softmax(row) for row in logits]
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        for position in sorted({int(case.info["positions"][t]) for t in rows}):
            rivals = [t for t in rows if case.info["positions"][t] == position]
            exact = Fraction(str(case.options["capacity"])) * len(rivals) / case.num_experts
            # Python rounds halves to the even, as the router does
            places = round(exact) if case.options["rounding"] == "round" else int(exact)
            for e in range(case.num_experts):
                order = sorted(rivals, key=lambda t: (-scores[t][e], case.info["sequences"][t]))
                found.pairs |= {(t, e): scores[t][e] for t in order[: max(places, 1)]}
    add_losses(found, case, logits, scores, None)
    return found


def expert_choice_threshold(case: Case) -> Expected:
    """Every expert whose remembered threshold the token's score reaches."""
    found = Expected()
    logits = logits_of(case)
    scores = [softmax(row) for row in logits]
    for t in case.real_tokens():
        for e in range(case.num_experts):
            if scores[t][e] >= case.state["threshold"][e]:
                found.pairs[t, e] = scores[t][e]
    add_losses(found, case, logits, scores, None)
    return found
