"""Expert choice among the tokens that stand at one position of several sequences: experts choose, nobody looks ahead.

Source: Expert Choice, Zhou et al., arXiv:2202.09368, section 6, where the authors suggest for autoregressive models
that the tokens of one sequence compete in different groups; which groups is this project's reading: one for each
position of a routing group's samples. Each expert takes c·B/E of the B tokens there, rounded to the nearest, at least
one.

Guaranteed: at each position every expert has the same load. Causal: a token competes with none of its own sequence. It
depends on the other sequences of its routing group (--moe-routing-group-samples, 2 or more), in evaluation too.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.capacity import exact, expert_places
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.expert_choice import ExpertChoiceRouter
from megatron_moe.moe.routers.expert_plan import plan_from_takers
from megatron_moe.moe.routers.group_table import group_table
from megatron_moe.moe.routers.options import parse_options
from megatron_moe.moe.routers.router import Router


@dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """What expert_choice_position alone can be told."""

    capacity: float = option(2.0, "c: experts per token on average", above=0)


class ExpertChoicePositionRouter(Router):
    """See the file's first lines."""

    Options = PositionOptions
    is_causal = True
    facts = Facts(
        paper="Expert Choice, arXiv:2202.09368, section 6",
        chooses="expert",
        batch_independent=False,
        scores="softmax before the choice",
        weights="raw score",
        capacity="round(B·c/E) of the B tokens at a position",
        good_for="perfect balance in a decoder, where many sequences are trained and decoded together",
        example={"routing_group_samples": 2},
    )
    unused_fields: ClassVar[tuple[str, ...]] = ExpertChoiceRouter.unused_fields
    options: PositionOptions

    def setup(self) -> None:
        super().setup()
        if self.config.routing_group_samples == 1:
            raise ConfigError(
                "--moe-routing-group-samples 1 leaves one token at each position of a group, which every expert would "
                "take; use 2 or more (as many as there are experts, or a multiple)."
            )
        if self.options.capacity > self.config.num_experts:
            raise ConfigError(
                f"--moe-router-options capacity={self.options.capacity:g} asks for more experts per token than "
                f"--num-experts {self.config.num_experts}; use {self.config.num_experts} or less."
            )

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token on average, rounded up; no limit follows, so none is computed from it."""
        capacity: float = parse_options(cls.Options, config).capacity
        return math.ceil(capacity)

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        scores = logits.softmax(dim=1)
        samples = self.config.routing_group_samples
        table = group_table(scores, _by_position(info, samples), self.group_axis)
        share = exact(self.options.capacity) / self.config.num_experts
        present = table.is_token.sum(dim=1)
        places = expert_places(present, share=share, rounding="round", at_least=1)
        # stable: among equals the earlier sample
        ranked = table.scores.transpose(1, 2).sort(dim=2, descending=True, stable=True).indices
        rows = table.rows[:, None].expand_as(ranked).gather(2, ranked)
        taken = (torch.arange(samples, device=ranked.device) < places[:, None, None]).expand_as(ranked)
        losses = self.aux_losses(logits, scores, None, info)
        return plan_from_takers(scores, rows, taken, aux_losses=losses, stats=router_stats(scores, info))


def _by_position(info: TokenInfo, samples: int) -> TokenInfo:
    """The same tokens with each position of a routing group as a group of its own."""
    length = info.group_size // samples
    return replace(
        info,
        groups=info.groups * length + info.positions - info.start,
        keys=info.keys - info.positions * samples,
        num_groups=info.num_groups * length,
        group_size=samples,
    )
