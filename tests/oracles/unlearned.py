"""hash, rand_hash and thor: nobody learns where a token goes; a table says it, or a draw."""

import json
from pathlib import Path

from oracles.case import Case, Expected
from oracles.draw import place, uniform, uniform_row


def hash_layer(case: Case) -> Expected:
    """Slice j of the expert that hash function j names: block (expert · N + j), weight 1."""
    slices = case.topk
    hashed = case.num_experts // slices
    kind = case.options["table"]
    where = place(case.seed, 0, f"hash/{kind}", case.layer)
    known = balanced_table(case, slices, hashed, where) if kind == "balanced" else []
    found = Expected()
    for t in case.real_tokens():
        token = int(case.info["ids"][t])
        # row 0 of the table of previous ids belongs to the first token of a document
        row = int(case.info["previous_ids"][t]) + 1 if kind == "previous" else token
        for j in range(slices):
            if kind == "mod":
                expert = token % hashed
            elif kind == "balanced":
                expert = known[j][token]
            else:
                expert = int(uniform_row(where, row, slices)[j] * hashed)
            found.pairs[t, expert * slices + j] = 1.0
    return found


def balanced_table(case: Case, slices: int, experts: int, where: int) -> list[list[int]]:
    """For each slice the expert of each id: the most frequent first, to the expert with the least load so far.

    After the first slice, ids come in the order of count · (1/2 + draw / 2). Ids that never occur go last, each to the
    expert with the fewest ids.
    """
    counts = json.loads(Path(case.options["token_counts"]).read_text(encoding="utf-8"))
    tables = []
    for j in range(slices):
        weigh = [1.0 if j == 0 else 0.5 + 0.5 * uniform_row(where, v, slices)[j] for v in range(len(counts))]
        table, load, held = [0] * len(counts), [0.0] * experts, [0] * experts
        for v in sorted(range(len(counts)), key=lambda v: (-counts[v] * weigh[v], v)):
            table[v] = min(range(experts), key=lambda e: (load[e] if counts[v] else held[e], e))
            load[table[v]] += counts[v]
            held[table[v]] += 1
        tables.append(table)
    return tables


def rand_hash(case: Case) -> Expected:
    """Different blocks for each id, by Floyd's sampling: candidate i is any of the first B - b + i + 1 blocks."""
    where = place(case.seed, 0, "rand_hash", case.layer)
    found = Expected()
    for t in case.real_tokens():
        taken: list[int] = []
        draws = uniform_row(where, int(case.info["ids"][t]), case.topk)
        for newest, draw in zip(range(case.num_experts - case.topk, case.num_experts), draws, strict=True):
            drawn = int(draw * (newest + 1))
            taken.append(newest if drawn in taken else drawn)
        found.pairs |= {(t, e): 1.0 for e in taken}
    return found


def thor(case: Case) -> Expected:
    """One drawn expert with weight 1; who shares the draw depends on the mode."""
    found = Expected()
    mode = case.options["granularity" if case.train else "inference"]
    step, stream = (case.step, "thor") if case.train else (0, "thor/evaluation")
    where = place(case.seed, step, stream, case.layer)
    for t in case.real_tokens():
        if mode == "ensemble":
            found.pairs |= {(t, e): 1 / case.num_experts for e in range(case.num_experts)}
            continue
        expert = case.options["fixed_expert"]
        if mode != "fixed":
            expert = int(uniform(where, shared_key(case, mode, t)) * case.num_experts)
        found.pairs[t, expert] = 1.0
    return found


def shared_key(case: Case, mode: str, t: int) -> int:
    """What is the same for all tokens that share a draw."""
    if mode == "batch":
        return int(case.info["passes"][t])
    if mode == "group":
        mates = case.info["groups"] == case.info["groups"][t]
        return int(case.info["sample_keys"][mates].min())
    return int(case.info["sample_keys" if mode == "sequence" else "global_keys"][t])
