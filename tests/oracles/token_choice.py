"""top_k, switch, gshard and st_moe by loops."""

import math

from oracles.case import Case, Expected
from oracles.draw import bits, place, uniform, uniform_row
from oracles.formulas import add_losses, best, logits_of, softmax


def top_k(case: Case) -> Expected:
    """The k largest; softmax over them or over all."""
    found = Expected()
    logits = logits_of(case)
    scores = [softmax(row) for row in logits]
    before = case.fields.get("router_pre_softmax", False)
    to_one = case.options["renormalise"] if case.options["renormalise"] is not None else not before
    chosen = [best(row, case.topk) for row in logits]
    for t in case.real_tokens():
        total = sum(scores[t][e] for e in chosen[t]) if to_one else 1.0
        for e in chosen[t]:
            found.pairs[t, e] = scores[t][e] / total * case.options["topk_scaling_factor"]
    add_losses(found, case, logits, scores, lambda t: chosen[t], case.options["balance"])
    return found


def switch(case: Case) -> Expected:
    """The largest, weighted by its probability; the input jitters in training."""
    found = Expected()
    tokens = case.tokens.copy()
    eps = case.options["jitter_eps"]
    if case.train and eps:
        where = place(case.seed, case.step, "jitter", case.layer)
        for t in range(len(tokens)):
            for h in range(tokens.shape[1]):
                # four features share 64 bits, the first in the lowest sixteen
                word = bits(where, bits(where, int(case.info["global_keys"][t])) + h // 4)
                quarter = (word >> (16 * (h % 4))) & 0xFFFF
                signed = quarter - 0x10000 if quarter >= 0x8000 else quarter
                tokens[t, h] *= 1.0 + eps * (signed + 0.5) * 2.0**-15
    logits = logits_of(case, tokens)
    scores = [softmax(row) for row in logits]
    for t in case.real_tokens():
        e = best(logits[t], 1)[0]
        found.pairs[t, e] = scores[t][e]
    add_losses(found, case, logits, scores, lambda t: best(logits[t], 1))
    return found


def gshard(case: Case) -> Expected:
    """The largest always, a second one by the policy."""
    found = Expected()
    logits = logits_of(case)
    scores = [softmax(row) for row in logits]
    policy = case.options["second_policy"] if case.train else "all"
    where = place(case.seed, case.step, "second_expert", case.layer)
    chosen = {}
    for t in range(len(logits)):
        first, second = best(logits[t], 2)
        if policy == "sampling":
            draws = uniform_row(where, int(case.info["global_keys"][t]), case.num_experts)
            noisy = [value - math.log(-math.log(draw)) for value, draw in zip(logits[t], draws, strict=True)]
            noisy[first] = -math.inf
            second = best(noisy, 1)[0]
        chosen[t] = [first, second]
    for t in case.real_tokens():
        first, second = chosen[t]
        pair = scores[t][first] + scores[t][second]
        used = [first, second]
        if policy == "random" and 2 * scores[t][second] / pair <= uniform(where, int(case.info["global_keys"][t])):
            used = [first]
        for e in used:
            found.pairs[t, e] = scores[t][e] / (pair if case.options["renormalise"] == "before_drop" else 1.0)
    add_losses(found, case, logits, scores, lambda t: chosen[t])
    return found


def st_moe(case: Case) -> Expected:
    """The n largest divided by their sum; those after the first if they weigh enough."""
    found = Expected()
    logits = logits_of(case)
    scores = [softmax(row) for row in logits]
    kind = "train" if case.train else "eval"
    policy, threshold = case.options[f"{kind}_policy"], case.options[f"{kind}_threshold"]
    where = place(case.seed, case.step, "further_experts", case.layer)
    chosen = [best(row, case.topk) for row in logits]
    for t in case.real_tokens():
        total = sum(scores[t][e] for e in chosen[t])
        draws = uniform_row(where, int(case.info["global_keys"][t]), case.topk - 1)
        found.pairs[t, chosen[t][0]] = scores[t][chosen[t][0]] / total
        for e, draw in zip(chosen[t][1:], draws, strict=True):
            share = scores[t][e] / total
            used = {"all": True, "none": False, "threshold": share > threshold, "random": share > draw * threshold}
            if used[policy]:
                found.pairs[t, e] = share
    add_losses(found, case, logits, scores, lambda t: chosen[t])
    return found


def expert_choice(case: Case) -> Expected:
    """Each expert takes the tokens of a group that prefer it most."""
    found = Expected()
    logits = logits_of(case)
    scores = [softmax(row) for row in logits]
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        exact = len(rows) * case.options["capacity"] / case.num_experts
        places = {"ceil": math.ceil, "floor": math.floor, "round": round}[case.options["rounding"]](exact)
        for e in range(case.num_experts):
            order = sorted(rows, key=lambda t: (-scores[t][e], case.info["keys"][t]))
            for t in order[: min(max(places, 1), len(rows))]:
                found.pairs[t, e] = scores[t][e]
    add_losses(found, case, logits, scores, None)
    return found
