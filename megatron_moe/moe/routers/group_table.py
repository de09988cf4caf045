"""All tokens' scores of a routing group, on every rank that shares it: for rules that decide over a group as a whole.

The table is ordered by group and key, so it is the same on every layout, to the last bit if the scores are: a rule that
computes with it in one fixed order decides alike everywhere. It costs each rank of group_axis the scores of the whole
group, E numbers for each token (the hidden state has H), and the computation is repeated on each of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.capacity import sorted_order
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.parallel.collectives import gather_counts
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class GroupTable:
    """One line for each place of each group; the last group of a microbatch may leave places at its end empty.

    group_size: places of a group; G below is num_groups.
    """

    scores: Tensor  # (G, group_size, E); what it was padded with where there is no token
    is_token: Tensor  # (G, group_size) bool: False for padding tokens and empty places
    rows: Tensor  # (G, group_size) int64 local row of the token; outside 0..T-1 it belongs to another rank
    lines: Tensor  # (T,) int64: where each local token stands in the flattened table

    def local(self, values: Tensor) -> Tensor:
        """(G, group_size, ...) what was decided for each place -> (T, ...) for the tokens of this rank."""
        return values.flatten(0, 1)[self.lines]


def group_table(scores: Tensor, info: TokenInfo, axis: Axis, *, absent: float = float("-inf")) -> GroupTable:
    """The scores of all tokens of all ranks of `axis` by group and key; collective, without gradient.

    scores: (T, E), this rank's tokens in any order.   absent: stands for padding tokens and empty places.
    """
    counts = gather_counts(scores.shape[0], axis, scores.device)
    place = torch.stack([info.groups, info.keys, info.is_padding.to(torch.int64)], dim=1)
    values = scores.detach().masked_fill(info.is_padding[:, None], absent)
    if sum(counts) > 0:
        place = axis.comm.all_gather(place, counts)
        values = axis.comm.all_gather(values, counts)
    order = sorted_order(place[:, 0], place[:, 1])
    groups = place[order, 0]
    in_group = torch.arange(len(order), device=order.device) - torch.searchsorted(groups, groups)
    line = groups * info.group_size + in_group
    start = sum(counts[: axis.rank])
    shape = (info.num_groups, info.group_size)
    lines = shape[0] * shape[1]
    table = values.new_full((lines, values.shape[1]), absent).index_copy_(0, line, values[order])
    is_token = torch.zeros(lines, dtype=torch.bool, device=line.device).index_copy_(0, line, place[order, 2] == 0)
    rows = order.new_full((lines,), -1).index_copy_(0, line, order - start)
    line_of_row = torch.empty_like(line).index_copy_(0, order, line)
    return GroupTable(
        scores=table.view(*shape, -1),
        is_token=is_token.view(shape),
        rows=rows.view(shape),
        lines=line_of_row[start : start + scores.shape[0]],
    )
