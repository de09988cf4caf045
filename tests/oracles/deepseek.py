"""DeepSeek's two rules by loops: groups by their best scores, experts within them, biases for the choice only."""

from collections.abc import Sequence

from oracles.case import Case, Expected
from oracles.formulas import add_losses, best, logits_of, sigmoid, softmax, z_loss


def _limited(case: Case, ranking: Sequence[float], speakers: int) -> list[int]:
    """The k best experts of the best groups, best first."""
    groups = case.options["num_groups"]
    if groups is None:
        return best(ranking, case.topk)
    width = case.num_experts // groups
    sums = [sum(sorted(ranking[g * width : (g + 1) * width])[-speakers:]) for g in range(groups)]
    kept = best(sums, case.options["topk_groups"])
    allowed = [value if e // width in kept else float("-inf") for e, value in enumerate(ranking)]
    return best(allowed, case.topk)


def deepseek(case: Case) -> Expected:
    """V1 and V2: raw softmax weights, groups by their maximum, three losses."""
    found = Expected()
    logits = logits_of(case)
    scores = [softmax(row) for row in logits]
    chosen = [_limited(case, row, 1) for row in scores]
    for t in case.real_tokens():
        for e in chosen[t]:
            found.pairs[t, e] = scores[t][e] * case.options["route_scale"]
    add_losses(found, case, logits, scores, lambda t: chosen[t], "normalised")
    groups = case.options["num_groups"]
    if groups is None or not case.train:
        return found
    width = case.num_experts // groups
    device = communication = 0.0
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        for d in range(groups if rows else 0):
            members = range(d * width, (d + 1) * width)
            p = sum(scores[t][e] for t in rows for e in members) / len(rows)
            counts = [sum(e in chosen[t] for t in rows) for e in members]
            f = sum(case.num_experts / (case.topk * len(rows)) * count for count in counts) / width
            sent = sum(any(e in members for e in chosen[t]) for t in rows)
            device += f * p
            communication += groups / (case.options["topk_groups"] * len(rows)) * sent * p
    for name, value in (("device_loss", device), ("communication_loss", communication)):
        if case.options[f"{name}_coeff"]:
            found.losses[name] = (value, case.options[f"{name}_coeff"], "group")
    return found


def deepseek_v3(case: Case) -> Expected:
    """V3: scores plus biases choose, scores alone weigh."""
    found = Expected()
    logits = logits_of(case)
    make = (lambda row: [sigmoid(value) for value in row]) if case.options["score"] == "sigmoid" else softmax
    scores = [make(row) for row in logits]
    bias = [float(value) for value in case.state["expert_bias"]]
    speakers = case.options["group_score_experts"]
    if speakers is None:
        speakers = max(1, case.topk // case.options["topk_groups"])
    for t in case.real_tokens():
        chosen = _limited(case, [s + b for s, b in zip(scores[t], bias, strict=True)], speakers)
        total = sum(scores[t][e] for e in chosen)
        for e in chosen:
            found.pairs[t, e] = case.options["route_scale"] * scores[t][e] / total
    if not case.train:
        return found
    if case.fields.get("z_loss_coeff"):
        found.losses["z_loss"] = (z_loss(case, logits), case.fields["z_loss_coeff"], "token")
    if case.options["sequence_loss_coeff"]:
        found.losses["sequence_loss"] = (_of_samples(case, scores), case.options["sequence_loss_coeff"], "sequence")
    return found


def _of_samples(case: Case, scores: Sequence[Sequence[float]]) -> float:
    """Σ over samples of Σ_e f_e P_e; f counts the k largest scores, without biases and groups (eq. 18)."""
    total = 0.0
    for sample in set(case.info["sequences"].tolist()):
        rows = [t for t in case.real_tokens() if case.info["sequences"][t] == sample]
        for e in range(case.num_experts if rows else 0):
            count = sum(e in best(scores[t], case.topk) for t in rows)
            p = sum(scores[t][e] / sum(scores[t]) for t in rows) / len(rows)
            total += case.num_experts / (case.topk * len(rows)) * count * p
    return total
