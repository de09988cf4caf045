"""The choice of experts from a token's few best groups: one device each in DeepSeek-V2, one node each in DeepSeek-V3.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.2.2 (a group is as good as its best expert); DeepSeek-V3,
arXiv:2412.19437, section 2.1.2 (as good as the sum of its best ones). A group is a run of consecutive experts, which
expert parallelism over as many ranks keeps together; on any other layout the choice is the same. Letters beyond the
house's: G groups, M of them kept for a token.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.routers.top_k import best_experts


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """What a router with groups of experts is told of them."""

    num_groups: int | None = option(
        None, "runs of equally many experts, such as a device's; 8 in DeepSeek-V2 and V3; none = no groups", at_least=2
    )
    topk_groups: int | None = option(
        None, "groups that a token's experts may come from; 3 of 8 in DeepSeek-V2, 4 of 8 in V3", at_least=1
    )


@dataclass(frozen=True)
class ExpertGroups:
    """num groups of `width` experts, of which a token uses `kept`; a group counts as the sum of its `best` scores."""

    num: int
    width: int
    kept: int
    best: int


def expert_groups(config: MoEConfig, options: GroupOptions, best: int = 1) -> ExpertGroups | None:
    """The groups that the options ask for, None without any. Raises ConfigError for what cannot be."""
    num, kept = options.num_groups, options.topk_groups
    if num is None or kept is None:
        _refuse_half(num, kept)
        return None
    experts, choices = config.num_experts, config.router_topk
    if experts % num:
        raise ConfigError(
            f"--moe-router-options num_groups={num}: --num-experts {experts} cannot be cut into so many equal groups; "
            f"use a divisor of {experts}."
        )
    width = experts // num
    if kept > num:
        raise ConfigError(
            f"--moe-router-options topk_groups={kept} is more than num_groups={num}; use {num} (no limit) or fewer."
        )
    if choices > kept * width:
        raise ConfigError(
            f"--moe-router-topk {choices} asks for more experts than topk_groups={kept} groups of {width} have; "
            f"use {kept * width} or fewer, or topk_groups={-(-choices // width)} or more."
        )
    return ExpertGroups(num, width, kept, best)


def limited_experts(scores: Tensor, choices: int, groups: ExpertGroups | None) -> Tensor:
    """(T, choices) int64: each row's best experts within its best groups, best first. No gradient.

    scores: (T, E), finite or NaN: what experts are ranked by; groups by the sum of their `best` largest.  Of equal
    groups and equal experts the first ones are taken.
    """
    if groups is None:
        return best_experts(scores, choices)
    scores = scores.detach()
    by_group = scores.unflatten(1, (groups.num, groups.width))
    kept = best_experts(by_group.topk(groups.best, dim=2).values.sum(dim=2), groups.kept)
    outside = scores.new_ones(len(scores), groups.num).scatter_(1, kept, 0.0).bool()
    return best_experts(by_group.masked_fill(outside[:, :, None], float("-inf")).flatten(1), choices)


def _refuse_half(num: int | None, kept: int | None) -> None:
    """Raises ConfigError where only one of the two was given."""
    if num is not None:
        raise ConfigError(
            f"--moe-router-options num_groups={num} without topk_groups does not say how many groups a token may use; "
            f"give topk_groups too ({num} = no limit), or neither."
        )
    if kept is not None:
        raise ConfigError(
            f"--moe-router-options topk_groups={kept} without num_groups has nothing to limit; give both or neither."
        )
