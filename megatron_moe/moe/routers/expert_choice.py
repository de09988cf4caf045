"""Expert choice: each expert takes the C tokens of the routing group that want it most.

Source: Zhou et al., arXiv:2202.09368, section 3.2, equations 1 to 4: S = softmax over experts, each expert takes its
top C = T · c / E tokens, and weighs its answer with the raw S; c is the mean number of experts per token (2 there).
There is no balance loss, and nothing is dropped afterwards. This project's reading: C is rounded down (or to the
nearest, as flaxformer does), is at least 1 and at most the group's tokens; ties go to the token with the lowest key,
that is the earliest; T counts the group's non-padding tokens; the paper's per-device variant is not offered, since it
would depend on the layout.

Guaranteed: every expert has exactly C different tokens of each group; a token has 0 to E experts. Not causal: whether a
token is taken depends on later tokens, and on other sequences of its group. Do not use it in a decoder, except to
study that (--moe-allow-noncausal).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.capacity import FILLED, exact, expert_places
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.expert_plan import plan_from_takers
from megatron_moe.moe.routers.group_table import group_table
from megatron_moe.moe.routers.options import parse_options
from megatron_moe.moe.routers.router import Router


def average_choices(table: type, config: MoEConfig) -> int:
    """Option capacity, experts per token on average, rounded up.   table: a router's Options."""
    capacity: float = parse_options(table, config).capacity
    return math.ceil(capacity)


def check_average(capacity: float, config: MoEConfig) -> None:
    """Raises ConfigError when a token would have more experts than there are."""
    if capacity > config.num_experts:
        raise ConfigError(
            f"--moe-router-options capacity={capacity:g} asks for more experts per token than "
            f"--num-experts {config.num_experts}; use {config.num_experts} or less."
        )


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceOptions:
    """What expert_choice alone can be told."""

    capacity: float = option(2.0, "c: experts per token on average", above=0)
    rounding: str = option("floor", "how T·c/E becomes a whole number of tokens", choices=("floor", "round"))


class ExpertChoiceRouter(Router):
    """See the file's first lines. Further rules by which experts choose override `choose`."""

    Options: ClassVar[type] = ExpertChoiceOptions
    is_causal = False
    facts = Facts(
        paper="Expert Choice, arXiv:2202.09368",
        chooses="expert",
        batch_independent=True,
        scores="softmax before the choice",
        weights="raw score",
        capacity="exactly T·c/E, c = 2",
        good_for="encoders: perfect balance without a loss, tokens get as many experts as they deserve",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_topk", *FILLED)
    options: ExpertChoiceOptions

    def setup(self) -> None:
        super().setup()
        check_average(self.options.capacity, self.config)

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token on average, rounded up; no limit follows, so none is computed from it."""
        return average_choices(cls.Options, config)

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H).  N = num_groups · E · C on every rank; what falls to other ranks' tokens is nobody's here."""
        logits = self.logits(tokens)
        scores = logits.softmax(dim=1)
        rows, taken = self.choose(scores.detach(), info)
        losses = self.aux_losses(logits, scores, None, info)
        return plan_from_takers(scores, rows, taken, aux_losses=losses, stats=router_stats(scores, info))

    def places(self, tokens: Tensor) -> Tensor:
        """C of groups with so many tokens."""
        share = exact(self.options.capacity) / self.config.num_experts
        return expert_places(tokens, share=share, rounding=self.options.rounding, at_least=1)

    def choose(self, scores: Tensor, info: TokenInfo) -> tuple[Tensor, Tensor]:
        """Both (num_groups, E, C): the tokens that each expert prefers, as local rows, and whether it takes them.

        C is that of a whole group without padding; a row outside 0..T-1 belongs to another rank.
        """
        table = group_table(scores, info, self.group_axis)
        most = int(self.places(torch.tensor(info.group_size)))  # on the host: nothing waits
        # stable: among equals the earlier token
        ranked = table.scores.transpose(1, 2).sort(dim=2, descending=True, stable=True).indices[..., :most]
        rows = table.rows[:, None].expand(*ranked.shape[:2], -1).gather(2, ranked)
        taken = torch.arange(most, device=ranked.device) < self.places(info.group_tokens)[:, None, None]
        return rows, taken.expand_as(ranked)
