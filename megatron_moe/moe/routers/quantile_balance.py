"""Quantile balancing: how far each expert's scores must sink for it to be asked for as often as the others.

Source: Megatron-LM's quantile balancing (its pull request 5349, qb_dual_update), read as quoted by others. With S the
scores, beta what is taken off them for the choice and alpha_t the (k+1)-th largest of token t's S - beta, the next
beta_e is the value that k / E of the tokens exceed in S_e - alpha. Megatron takes it over a microbatch and means over
these; here it is taken over a routing group and means over the step's groups, so that no layout changes it.
"""

import torch
from torch import Tensor

from megatron_moe.moe.plan import TokenInfo
from megatron_moe.parallel.collectives import gather_counts
from megatron_moe.parallel.state import Axis


def quantile_stats(scores: Tensor, bias: Tensor, choices: int, info: TokenInfo, group_axis: Axis) -> dict[str, Tensor]:
    """What next_bias needs: "quantile_sum" (E,) over routing groups, and how many "quantile_groups" that are.

    scores: (T, E) wide, without gradient.   bias: (E,) added for the choice.   choices: k, less than E.
    Every rank of group_axis comes to the groups' values; the first one tells them.
    """
    cutoff = (scores + bias).topk(choices + 1, dim=1).values[:, -1:]
    quantiles = _quantiles(scores - cutoff, choices, info, group_axis)
    counted = (info.group_tokens > 0) & group_axis.is_first
    return {
        "quantile_sum": quantiles.masked_fill(~counted[:, None], 0.0).sum(dim=0),
        "quantile_groups": counted.sum(),
    }


def next_bias(stats: dict[str, Tensor]) -> Tensor:
    """(E,) float64: the bias after a step, from its summed statistics; zeros of a step without tokens."""
    return -stats["quantile_sum"] / stats["quantile_groups"].clamp(min=1)


def _quantiles(margins: Tensor, choices: int, info: TokenInfo, group_axis: Axis) -> Tensor:
    """(num_groups, E): what k / E of each whole group's non-padding tokens, rounded down, exceed in each column."""
    experts = margins.shape[1]
    home = info.groups.masked_fill(info.is_padding, info.num_groups)
    counts = gather_counts(len(margins), group_axis, margins.device)
    if sum(counts) == 0:
        return margins.new_zeros(info.num_groups, experts)
    margins, home = group_axis.comm.all_gather(margins, counts), group_axis.comm.all_gather(home, counts)
    exceeding = info.group_tokens * choices // experts
    found = []
    for group in range(info.num_groups):
        ranked = margins.masked_fill((home != group)[:, None], float("-inf")).sort(dim=0, descending=True).values
        found.append(ranked.index_select(0, exceeding[group : group + 1]))
    return torch.cat(found)
