"""Fixed maps from token ids to experts: drawn from a keyed stream, or filled by how often each id occurs.

V ids; every function is pure, so all ranks and all runs of one seed make the same table.
"""

import heapq
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.parallel.random import KeyedRandom


def known_ids(ids: Tensor, info: TokenInfo) -> Tensor:
    """(T,) ids to look up; padding, whose id may be anything, looks up 0."""
    return ids.masked_fill(info.is_padding, 0)


def random_table(num_ids: int, num_tables: int, num_experts: int, random: KeyedRandom) -> Tensor:
    """(V, num_tables) int64 below num_experts: each entry is drawn evenly and by itself."""
    draws = random.uniform_rows(torch.arange(num_ids), num_tables)
    return (draws * num_experts).to(torch.int64)


def distinct_table(num_ids: int, num_choices: int, num_experts: int, random: KeyedRandom) -> Tensor:
    """(V, num_choices) int64 below num_experts: each row is drawn evenly among all sets of so many experts."""
    draws = random.uniform_rows(torch.arange(num_ids), num_choices)
    found = torch.empty(num_ids, num_choices, dtype=torch.int64)
    # Floyd's sampling: the next of the last experts joins each time, itself or in place of one that is taken already
    for place, newest in enumerate(range(num_experts - num_choices, num_experts)):
        drawn = (draws[:, place] * (newest + 1)).to(torch.int64)
        taken = (found[:, :place] == drawn[:, None]).any(dim=1)
        found[:, place] = drawn.masked_fill(taken, newest)
    return found


def balanced_table(counts: Tensor, num_tables: int, num_experts: int, random: KeyedRandom) -> Tensor:
    """(V, num_tables) int64 below num_experts: the most frequent id first, each to the expert with the least load.

    counts: (V,) float64, how often each id occurs.  The first table follows the counts; each further one takes the ids
    in the order of their counts times a number drawn between 1/2 and 1, so that ids which share an expert in one table
    do not in the next.
    """
    factors = 0.5 + 0.5 * random.uniform_rows(torch.arange(len(counts)), num_tables)
    factors[:, 0] = 1.0
    return torch.stack([_fill(counts, counts * factor, num_experts) for factor in factors.unbind(dim=1)], dim=1)


def _fill(counts: Tensor, urgency: Tensor, num_experts: int) -> Tensor:
    """(V,) the expert of each id, in the order of urgency; ids that never occur go where the fewest ids are."""
    weights = counts.tolist()
    order = urgency.argsort(descending=True, stable=True).tolist()
    seen = [token for token in order if weights[token] > 0]
    found = torch.empty(len(weights), dtype=torch.int64)
    ids_held = [0] * num_experts
    loads = [(0.0, expert) for expert in range(num_experts)]
    for token in seen:
        load, expert = loads[0]
        heapq.heapreplace(loads, (load + weights[token], expert))
        found[token] = expert
        ids_held[expert] += 1
    held = [(number, expert) for expert, number in enumerate(ids_held)]
    heapq.heapify(held)
    for token in order[len(seen) :]:
        number, expert = held[0]
        heapq.heapreplace(held, (number + 1, expert))
        found[token] = expert
    return found


def read_counts(place: str, num_ids: int) -> Tensor:
    """(V,) float64: how often each id occurs, from a .npy file or a .json list.

    num_ids: V; up to 1 says that it is not known yet, and any length will do.   Raises ConfigError.
    """
    given = f"--moe-router-options token_counts={place}"
    path = Path(place)
    try:
        values = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.array(json.loads(path.read_text()))
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(
            f"{given} cannot be read ({error}); give the .npy file that tools/inspect_dataset.py PREFIX --token-counts "
            f"writes, or a .json list of one number for each id."
        ) from error
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise ConfigError(f"{given} holds {values.dtype} of shape {values.shape}; expected one number for each id.")
    if num_ids > 1 and len(values) != num_ids:
        raise ConfigError(
            f"{given} counts {len(values)} ids, but the vocabulary has {num_ids}; count again with the tokenizer of "
            f"this run (tools/inspect_dataset.py PREFIX --token-counts FILE --vocab-size {num_ids})."
        )
    counts = torch.from_numpy(values.astype(np.float64))
    if not bool(counts.isfinite().all()) or bool((counts < 0).any()) or not bool(counts.any()):
        raise ConfigError(f"{given}: expected finite numbers of at least 0, and one above it.")
    return counts
