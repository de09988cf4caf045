"""Noisy top-k, prototypes and ReLU routing by loops."""

import math

from oracles.case import Case, Expected
from oracles.draw import mix, normal, place
from oracles.formulas import add_losses, balance_loss, best, logits_of, softmax


def noisy_top_k(case: Case) -> Expected:
    """Shazeer's and V-MoE's."""
    found = Expected()
    clean = logits_of(case)
    learned = case.options["noise"] == "learned"
    where = place(case.seed, case.step, "noise", case.layer)
    noisy, deviation = [], []
    for t, row in enumerate(clean):
        if learned:
            raw = [float(case.tokens[t] @ w) for w in case.parameters["noise_weight"]]
            std = [max(math.log1p(math.exp(value)), 1e-6) for value in raw]
        else:
            std = [case.options["noise_std"] / case.num_experts] * case.num_experts
        start = mix(int(case.info["global_keys"][t]) & (2**64 - 1))
        draws = [normal(where, start + e) for e in range(case.num_experts)]
        noise = [s * n if case.train else 0.0 for s, n in zip(std, draws, strict=True)]
        noisy.append([value + n for value, n in zip(row, noise, strict=True)])
        deviation.append(std)
    scores = [softmax(row) for row in noisy]
    chosen = [best(row, case.topk) for row in noisy]
    for t in case.real_tokens():
        whole = 1.0 if case.fields.get("router_pre_softmax") else sum(scores[t][e] for e in chosen[t])
        for e in chosen[t]:
            found.pairs[t, e] = scores[t][e] / whole
    add_losses(found, case, clean, scores, lambda t: chosen[t])
    if case.train:
        _spread(case, found, clean, noisy, deviation, learned)
    return found


def _spread(case: Case, found: Expected, clean: list, noisy: list, deviation: list, learned: bool) -> None:
    importance = load = 0.0
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        if not rows:
            continue
        weight = [0.0] * case.num_experts
        expected = [0.0] * case.num_experts
        for t in rows:
            quiet = softmax(clean[t])
            for e in range(case.num_experts):
                weight[e] += found.pairs.get((t, e), 0.0) if learned else quiet[e]
                others = [value for place_, value in enumerate(noisy[t]) if place_ != e or not learned]
                threshold = sorted(others, reverse=True)[case.topk - 1]
                above = (clean[t][e] - threshold) / deviation[t][e]
                expected[e] += 0.5 * math.erfc(-above / math.sqrt(2))
        importance += _squared_variation(weight)
        load += _squared_variation(expected)
    for name, value in (("importance", importance), ("load", load)):
        if case.options[f"{name}_coeff"]:
            found.losses[f"{name}_loss"] = (value, case.options[f"{name}_coeff"], "group")


def _squared_variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def m6_t(case: Case) -> Expected:
    """The best expert of each prototype."""
    found = Expected()
    logits = logits_of(case)
    size = case.num_experts // case.topk
    balance = z = 0.0
    chosen: dict[tuple[int, int], int] = {}
    scores = [[p for j in range(case.topk) for p in softmax(row[j * size : (j + 1) * size])] for row in logits]
    for t in case.real_tokens():
        for j in range(case.topk):
            own = range(j * size, (j + 1) * size)
            chosen[t, j] = own[best([logits[t][e] for e in own], 1)[0]]
            found.pairs[t, chosen[t, j]] = scores[t][chosen[t, j]]
            z += math.log(sum(math.exp(logits[t][e]) for e in own)) ** 2
    if not case.train:
        return found
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        for j in range(case.topk if rows else 0):
            for e in range(j * size, (j + 1) * size):
                f = sum(chosen[t, j] == e for t in rows) / len(rows)
                balance += size * f * sum(scores[t][e] for t in rows) / len(rows)
    found.losses["load_balance_loss"] = (balance, case.fields["aux_loss_coeff"], "group")
    found.losses["z_loss"] = (z, case.fields["z_loss_coeff"], "token")
    return found


def remoe(case: Case) -> Expected:
    """Every expert with a positive logit."""
    found = Expected()
    gates = [[max(0.0, value) for value in row] for row in logits_of(case)]
    for t in case.real_tokens():
        for e, gate in enumerate(gates[t]):
            if gate > 0:
                found.pairs[t, e] = gate
    if case.train:
        active = lambda t: [e for e, gate in enumerate(gates[t]) if gate > 0]  # noqa: E731
        value = balance_loss(case, gates, active, "all_choices") / case.topk
        found.losses["relu_regulariser"] = (value, float(case.state["coefficient"]), "group")
    return found
