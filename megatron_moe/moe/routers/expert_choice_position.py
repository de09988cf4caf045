"""Expert choice among the tokens that stand at one position of several sequences: experts choose, nobody looks ahead.

Source: Expert Choice, Zhou et al., arXiv:2202.09368, section 6, where the authors suggest for autoregressive models
that the tokens of one sequence compete in different groups; which groups is this project's reading: one for each
position of a routing group's samples. Each expert takes c·B/E of the B tokens there, rounded to the nearest, at least
one.

Guaranteed: at each position every expert has the same load. Causal: a token competes with none of its own sequence. It
depends on the other sequences of its routing group (--moe-routing-group-samples, 2 or more), in evaluation too.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.routers.expert_choice import ExpertChoiceOptions, ExpertChoiceRouter
from megatron_moe.moe.routers.group_table import group_table


@dataclass(frozen=True, kw_only=True)
class PositionOptions(ExpertChoiceOptions):
    """What expert_choice_position alone can be told."""

    rounding: str = option("round", "how B·c/E becomes a whole number of samples", choices=("floor", "round"))


class ExpertChoicePositionRouter(ExpertChoiceRouter):
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
    options: PositionOptions

    def setup(self) -> None:
        super().setup()
        if self.config.routing_group_samples == 1:
            raise ConfigError(
                "--moe-routing-group-samples 1 leaves one token at each position of a group, which every expert would "
                "take; use 2 or more (as many as there are experts, or a multiple)."
            )

    def choose(self, scores: Tensor, info: TokenInfo) -> tuple[Tensor, Tensor]:
        """Both (num_groups · positions, E, samples): the tokens that each expert prefers, and whether it takes them."""
        samples = self.config.routing_group_samples
        table = group_table(scores, _by_position(info, samples), self.group_axis)
        places = self.places(table.is_token.sum(dim=1))
        # stable: among equals the earlier sample
        ranked = table.scores.transpose(1, 2).sort(dim=2, descending=True, stable=True).indices
        rows = table.rows[:, None].expand_as(ranked).gather(2, ranked)
        taken = torch.arange(samples, device=ranked.device) < places[:, None, None]
        return rows, taken.expand_as(ranked)


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
