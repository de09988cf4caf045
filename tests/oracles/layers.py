"""Layers that assign nothing, once more: loops over tokens, cells and experts, written from their papers' formulas.

Weights are small lists of rows, and every sum is written out. Answers (T, H); a padding token's is zero.
"""

import math
from collections.abc import Callable

import numpy as np
from oracles.case import Case
from oracles.draw import bits, inverse_normal, place, uniform, uniform_row
from oracles.formulas import best, softmax

Answers = np.ndarray
NORM_EPSILON = 1e-5  # of query norms
UNIT_EPSILON = 1e-6  # of Soft MoE's vectors of length one


def act(name: str, value: float) -> float:
    """relu, or gelu by the error function."""
    if name == "relu":
        return max(value, 0.0)
    return value * 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))


def uniform_of(case: Case, stream: str) -> int:
    """Where the draws of a stream are keyed."""
    return place(case.seed, case.step, stream, case.layer)


def width_of(case: Case) -> int:
    return int(case.fields["ffn_hidden_size"])


def active_of(case: Case) -> int:
    """Cells of a token."""
    return int(case.options["active_cells"] or case.topk * width_of(case))


def vanilla_memory(case: Case) -> Answers:
    """Every cell's own key; the best cells' values, weighted by act(score)."""
    return _keyed(case, case.tokens)


def low_rank_keys(case: Case) -> Answers:
    """The same with keys D · U: a token is made short by U first."""
    return _keyed(case, np.array([[float(row @ token) for row in case.parameters["down"]] for token in case.tokens]))


def _keyed(case: Case, queries: np.ndarray) -> Answers:
    keys, values = case.parameters["keys"], case.parameters["values"]
    out = np.zeros_like(case.tokens)
    for t in case.real_tokens():
        scores = [float(key @ queries[t]) for key in keys]
        for cell in best(scores, active_of(case)):
            out[t] += act(case.fields["activation"], scores[cell]) * values[cell]
    return out


def product_keys(case: Case) -> Answers:
    """Each head's knn best sums of two sub-scores, of all pairs; softmax over them."""
    return _by_products(case, heads=case.options["heads"], knn=_knn(case), weigh=softmax)


def product_keys_ffn(case: Case) -> Answers:
    """One head, whose scores are activated."""
    name = case.fields["activation"]
    return _by_products(case, heads=1, knn=active_of(case), weigh=lambda scores: [act(name, one) for one in scores])


def _knn(case: Case) -> int:
    cells = case.topk * int(case.fields.get("ffn_hidden_size", 0))
    return int(case.options["knn"] or cells // case.options["heads"])


def _by_products(case: Case, *, heads: int, knn: int, weigh: Callable[[list[float]], list[float]]) -> Answers:
    sub_keys, values = case.parameters["sub_keys"], case.parameters["values"]
    queries = _queries(case, heads)
    out = np.zeros_like(case.tokens)
    number = sub_keys.shape[2]
    for t in case.real_tokens():
        for head in range(heads):
            first, second = queries[t, head].reshape(2, -1)
            left = [float(key @ first) for key in sub_keys[head, 0]]
            right = [float(key @ second) for key in sub_keys[head, 1]]
            sums = [left[cell // number] + right[cell % number] for cell in range(number * number)]
            chosen = _best_pairs(left, right, knn)
            for cell, weight in zip(chosen, weigh([sums[cell] for cell in chosen]), strict=True):
                out[t] += weight * values[cell]
    return out


def _best_pairs(left: list[float], right: list[float], count: int) -> list[int]:
    """The largest sums; of equals those with the better first half, then the lowest."""
    number = len(left)
    pairs = [(i, j) for i in range(number) for j in range(number)]
    pairs.sort(key=lambda pair: (-(left[pair[0]] + right[pair[1]]), -left[pair[0]], pair))
    return [i * number + j for i, j in pairs[:count]]


def _queries(case: Case, heads: int) -> np.ndarray:
    """(T, heads, key_dim), normalised as the option says, and shifted."""
    flat = np.array([[float(row @ token) for row in case.parameters["query"]] for token in case.tokens])
    kind = case.options["query_norm"]
    if kind == "layer":
        for t in range(len(flat)):
            for part in np.split(flat[t], heads):
                part[:] = (part - part.mean()) / math.sqrt(part.var() + NORM_EPSILON)
    elif kind == "batch" and not case.train:
        mean, variance = case.state["batch_norm.running_mean"], case.state["batch_norm.running_variance"]
        flat = (flat - mean) / np.sqrt(variance + NORM_EPSILON)
    elif kind == "batch":
        for group in range(case.num_groups):
            rows = case.real_tokens(group)
            if rows:
                members = flat[rows]
                flat[rows] = (members - members.mean(axis=0)) / np.sqrt(members.var(axis=0) + NORM_EPSILON)
    return (flat + case.parameters["query_bias"]).reshape(len(flat), heads, -1)


def controller(case: Case) -> Answers:
    """The best cell of each block by a short product, with Gumbel noise in training."""
    down, control = case.parameters["down"], case.parameters["control"]
    keys, values = case.parameters["keys"], case.parameters["values"]
    block = len(keys) // active_of(case)
    where = uniform_of(case, "cells")
    out = np.zeros_like(case.tokens)
    for t in case.real_tokens():
        short = [float(row @ case.tokens[t]) for row in down]
        scores = [float(row @ np.array(short)) for row in control]
        if case.train and case.options["gumbel_noise"]:
            mine = bits(where, int(case.info["global_keys"][t]))
            draws = [uniform(where, mine + cell) for cell in range(len(scores))]
            scores = [score - math.log(-math.log(draw)) for score, draw in zip(scores, draws, strict=True)]
        for start in range(0, len(scores), block):
            cell = start + best(scores[start : start + block], 1)[0]
            out[t] += act(case.fields["activation"], float(keys[cell] @ case.tokens[t])) * values[cell]
    return out


def _expert(w1: np.ndarray, w2: np.ndarray, name: str, row: np.ndarray) -> np.ndarray:
    """act(W1 x) through W2, w1 (1, F, H)."""
    inner = np.array([act(name, float(key @ row)) for key in w1[0]])
    return np.array([float(line @ inner) for line in w2])


def soft_moe(case: Case) -> Answers:
    """Slots are weighted means of a group's tokens, answers weighted means of what experts make of the slots."""
    phi, scale = case.parameters["phi"], float(case.parameters["scale"][0])
    w1, w2 = case.parameters["experts.w1"], case.parameters["experts.w2"]
    unit = [row / max(float(np.sqrt(row @ row)), UNIT_EPSILON) for row in phi]
    out = np.zeros_like(case.tokens)
    for group in range(case.num_groups):
        rows = case.real_tokens(group)
        logits = {t: _slot_logits(case, t, unit, scale) for t in rows}
        made = []
        for slot in range(len(phi)):
            shares = softmax([logits[t][slot] for t in rows]) if rows else []
            mean = sum((share * case.tokens[t] for share, t in zip(shares, rows, strict=True)), 0.0 * case.tokens[0])
            expert = slot // case.options["slots"]
            made.append(_expert(w1[expert], w2[expert], case.fields["activation"], mean))
        for t in rows:
            for share, answer in zip(softmax(logits[t]), made, strict=True):
                out[t] += share * answer
    return out


def _slot_logits(case: Case, t: int, unit: list[np.ndarray], scale: float) -> list[float]:
    token = case.tokens[t] / max(float(np.sqrt(case.tokens[t] @ case.tokens[t])), UNIT_EPSILON)
    found = [scale * float(token @ row) for row in unit]
    if case.train and case.options["noise_std"]:
        where = uniform_of(case, "slot_noise")
        draws = uniform_row(where, int(case.info["global_keys"][t]), len(found))
        found = [one + case.options["noise_std"] * inverse_normal(draw) for one, draw in zip(found, draws, strict=True)]
    return found


def smear(case: Case) -> Answers:
    """One expert for each sample, its weights the mean of all experts' by the sample's shares."""
    w1, w2 = case.parameters["experts.w1"], case.parameters["experts.w2"]
    out = np.zeros_like(case.tokens)
    for sample in sorted(set(case.info["sequences"].tolist())):
        rows = [t for t in case.real_tokens() if case.info["sequences"][t] == sample]
        if not rows:
            continue
        shares = _shares(case, sum(case.tokens[t] for t in rows) / len(rows), int(case.info["sample_keys"][rows[0]]))
        first = sum(share * w1[e] for e, share in enumerate(shares))
        second = sum(share * w2[e] for e, share in enumerate(shares))
        for t in rows:
            out[t] = _expert(np.asarray(first), np.asarray(second), case.fields["activation"], case.tokens[t])
    return out


def _shares(case: Case, mean: np.ndarray, key: int) -> list[float]:
    jitter, dropout = case.options["jitter_eps"], case.options["expert_dropout"]
    if case.train and jitter:
        draws = uniform_row(uniform_of(case, "jitter"), key, len(mean))
        mean = np.array([value * (1.0 + jitter * (2.0 * draw - 1.0)) for value, draw in zip(mean, draws, strict=True)])
    shares = softmax([float(row @ mean) for row in case.parameters["weight"]])
    if case.train and dropout:
        draws = uniform_row(uniform_of(case, "experts"), key, len(shares))
        kept = [share if draw >= dropout else 0.0 for share, draw in zip(shares, draws, strict=True)]
        shares = [share / sum(kept) for share in kept] if sum(kept) else shares
    return shares


LAYER_ORACLES: dict[str, Callable[[Case], Answers]] = {
    "vanilla_memory": vanilla_memory,
    "low_rank_keys": low_rank_keys,
    "product_keys": product_keys,
    "product_keys_ffn": product_keys_ffn,
    "controller": controller,
    "soft_moe": soft_moe,
    "smear": smear,
}
RELU, GELU = {"activation": "relu", "ffn_hidden_size": 4}, {"activation": "gelu", "ffn_hidden_size": 4}
LAYER_CASES = {
    "vanilla_memory": {"router_type": "vanilla_memory", "router_topk": 1, **RELU},
    "vanilla_memory-seven": {"router_type": "vanilla_memory", "router_options": {"active_cells": "7"}, **GELU},
    "low_rank_keys": {"router_type": "low_rank_keys", "router_topk": 1, "router_options": {"rank": "3"}, **GELU},
    "product_keys": {
        "router_type": "product_keys",
        "ffn_hidden_size": 4,
        "router_options": {"heads": "2", "key_dim": "4", "knn": "3"},
    },
    "product_keys-batch": {
        "router_type": "product_keys",
        "ffn_hidden_size": 4,
        "routing_group_samples": 2,
        "router_options": {"heads": "2", "key_dim": "4", "query_norm": "batch"},
    },
    "product_keys-plain": {
        "router_type": "product_keys",
        "ffn_hidden_size": 4,
        "router_topk": 1,
        "router_options": {"heads": "1", "key_dim": "2", "query_norm": "none"},
    },
    "product_keys_ffn": {"router_type": "product_keys_ffn", "router_options": {"key_dim": "4"}, **GELU},
    "controller": {"router_type": "controller", "router_topk": 1, "router_options": {"rank": "3"}, **GELU},
    "controller-still": {
        "router_type": "controller",
        "router_options": {"rank": "2", "gumbel_noise": "false", "active_cells": "8"},
        **RELU,
    },
    "soft_moe": {"router_type": "soft_moe", "router_options": {"slots": "2"}, **RELU},
    "soft_moe-noise": {
        "router_type": "soft_moe",
        "routing_group_samples": 2,
        "router_options": {"noise_std": "0.7"},
        **GELU,
    },
    "smear": {"router_type": "smear", **GELU},
    "smear-drawn": {
        "router_type": "smear",
        "router_options": {"expert_dropout": "0.4", "jitter_eps": "0.1"},
        **RELU,
    },
}
