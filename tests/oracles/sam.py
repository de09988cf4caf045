"""SAM by loops: one group for each token, then the best experts of it."""

from oracles.case import Case, Expected
from oracles.formulas import best, logits_of, softmax, z_loss


def sam(case: Case) -> Expected:
    """Both modes."""
    return _flat(case) if case.options["mode"] == "flat" else _hierarchical(case)


def _members(case: Case, group: int) -> range:
    width = case.num_experts // case.options["groups"]
    return range(group * width, (group + 1) * width)


def _flat(case: Case) -> Expected:
    found = Expected()
    bias = case.parameters.get("bias", [0.0] * case.num_experts)
    logits = [[value + float(b) for value, b in zip(row, bias, strict=True)] for row in logits_of(case)]
    scores = [softmax(row) for row in logits]
    chosen: dict[int, list[int]] = {}
    align = 0.0
    for t in case.real_tokens():
        sums = [sum(scores[t][e] for e in _members(case, g)) for g in range(case.options["groups"])]
        members = _members(case, best(sums, 1)[0])
        chosen[t] = [members[place] for place in best([scores[t][e] for e in members], case.topk)]
        whole = sum(scores[t][e] for e in chosen[t]) if case.options["renormalise"] else 1.0
        for e in chosen[t]:
            found.pairs[t, e] = scores[t][e] / whole
        worst = scores[t][chosen[t][-1]]
        align += sum(max(0.0, scores[t][e] - worst) for e in range(case.num_experts) if e not in members)
    if not case.train:
        return found
    balance = 0.0
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        for e in range(case.num_experts if rows else 0):
            # the i-th choice of a token is e for one i at most
            share = sum(e in chosen[t] for t in rows) / len(rows)
            balance += case.num_experts * share * sum(scores[t][e] for t in rows) / len(rows)
    found.losses["load_balance_loss"] = (balance, case.fields["aux_loss_coeff"], "group")
    found.losses["z_loss"] = (z_loss(case, logits), case.fields["z_loss_coeff"], "token")
    if case.options["align_coeff"]:
        unit = "token" if case.options["align_reduction"] == "mean" else "group"
        found.losses["alignment_loss"] = (align, case.options["align_coeff"], unit)
    return found


def _hierarchical(case: Case) -> Expected:
    found = Expected()
    groups = case.options["groups"]
    width = case.num_experts // groups
    outer = [[float(row @ w) for w in case.parameters["group_weight"]] for row in case.tokens]
    inner = logits_of(case)
    q = [softmax(row) for row in outer]
    home = {t: best(outer[t], 1)[0] for t in case.real_tokens()}
    r: dict[int, list[float]] = {}
    chosen: dict[int, list[int]] = {}
    for t, group in home.items():
        members = _members(case, group)
        r[t] = softmax([inner[t][e] for e in members])
        chosen[t] = best(r[t], case.topk)
        whole = sum(r[t][place] for place in chosen[t]) if case.options["renormalise"] else 1.0
        for place in chosen[t]:
            found.pairs[t, members[place]] = q[t][group] * r[t][place] / whole
    if not case.train:
        return found
    switch = within = 0.0
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        for g in range(groups if rows else 0):
            arrived = [t for t in rows if home[t] == g]
            switch += groups * len(arrived) / len(rows) * sum(q[t][g] for t in rows) / len(rows)
            for place in range(width if arrived else 0):
                f = sum(place in chosen[t] for t in arrived) / len(arrived)
                p = sum(r[t][place] for t in arrived) / len(arrived)
                within += len(arrived) / len(rows) * width * f * p
    coeff = case.options["expert_balance_coeff"]
    aux = case.fields["aux_loss_coeff"]
    found.losses["load_balance_loss"] = (switch, aux, "group")
    found.losses["expert_balance_loss"] = (within, aux if coeff is None else coeff, "group")
    own = [[inner[t][e] for e in _members(case, home.get(t, 0))] for t in range(len(inner))]
    found.losses["z_loss"] = (z_loss(case, outer) + z_loss(case, own), case.fields["z_loss_coeff"], "token")
    return found
