"""avg_k: blocks of a memory, chosen by the mean of their keys."""

import numpy as np
from oracles.case import Case, Expected
from oracles.formulas import add_losses, best, sigmoid, softmax


def avg_k(case: Case) -> Expected:
    """The b blocks whose mean key likes the token best: s_i = x · e_i."""
    assert case.expert_keys is not None
    found = Expected()
    scores = [[float(np.dot(token, key)) for key in case.expert_keys] for token in case.tokens]
    shares = [softmax(row) for row in scores]
    chosen = [best(row, case.topk) for row in scores]
    for t in case.real_tokens():
        for e in chosen[t]:
            weight = {"one": 1.0, "softmax": shares[t][e], "sigmoid": sigmoid(scores[t][e])}
            found.pairs[t, e] = weight[case.options["gate_weight"]]
    add_losses(found, case, scores, shares, lambda t: chosen[t], "normalised")
    return found
