"""base and sinkhorn: plans in which all experts of a group are to have the same load."""

from itertools import combinations

import numpy as np
from oracles.case import Case, Expected
from oracles.formulas import add_losses, best, logits_of, sigmoid, softmax
from scipy.optimize import linear_sum_assignment

MEGATRON_EPS = 1e-8


def base(case: Case) -> Expected:
    """The assignment of equal loads with the largest sum of scores; in evaluation each token's best expert."""
    found = Expected()
    logits = logits_of(case)
    if case.train:
        chosen = {t: e for group in range(case.num_groups) for t, e in best_assignment(case, logits, group).items()}
    else:
        chosen = {t: best(logits[t], 1)[0] for t in case.real_tokens()}
    found.pairs = {(t, e): sigmoid(logits[t][e]) for t, e in chosen.items()}
    add_losses(found, case, logits, logits, None)
    return found


def best_assignment(case: Case, logits: list[list[float]], group: int) -> dict[int, int]:
    """Token -> expert. Where T/E is no whole number, every choice of the experts with one more token is tried."""
    rows = case.real_tokens(group)
    places, more = divmod(len(rows), case.num_experts)
    answers: list[tuple[float, dict[int, int]]] = []
    for larger in combinations(range(case.num_experts), more):
        columns = [e for e in range(case.num_experts) for _ in range(places + (e in larger))]
        scores = np.array([[logits[t][e] for e in columns] for t in rows]).reshape(len(rows), len(columns))
        lines, places_taken = linear_sum_assignment(scores, maximize=True)
        taken = {rows[i]: columns[j] for i, j in zip(lines, places_taken, strict=True)}
        answers.append((float(scores[lines, places_taken].sum()), taken))
    return max(answers, key=lambda answer: answer[0])[1]


def sinkhorn(case: Case) -> Expected:
    """The k largest of a token's row of the transport plan; in evaluation its k largest logits."""
    found = Expected()
    logits = logits_of(case)
    wishes = transport_plans(case, logits) if case.train else dict(enumerate(logits))
    for t in case.real_tokens():
        shares = softmax(logits[t])
        for e in best(wishes[t], case.topk):
            found.pairs[t, e] = sigmoid(logits[t][e]) if case.topk == 1 else shares[e]
    add_losses(found, case, logits, logits, None)
    return found


def transport_plans(case: Case, logits: list[list[float]]) -> dict[int, list[float]]:
    """Token -> its row of Pi = diag(a) K diag(b), whose rows are to sum to 1/T and columns to 1/E."""
    plans = {}
    experts = range(case.num_experts)
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        kernel = {t: [float(np.exp(value / case.options["temperature"])) for value in logits[t]] for t in rows}
        a, b = dict.fromkeys(rows, 1.0), [1.0] * len(experts)
        for _ in range(case.options["iterations"]):
            before = b
            for t in rows:
                a[t] = 1 / len(rows) / (sum(kernel[t][e] * b[e] for e in experts) + MEGATRON_EPS)
            b = [1 / len(experts) / (sum(kernel[t][e] * a[t] for t in rows) + MEGATRON_EPS) for e in experts]
            if sum(abs(b[e] - before[e]) for e in experts) / len(experts) <= case.options["tolerance"]:
                break
        plans |= {t: [a[t] * kernel[t][e] * b[e] for e in experts] for t in rows}
    return plans
