"""Expert choice with a cap: each expert takes C tokens of the routing group, and no token has more than b experts.

Source: Zhou et al., arXiv:2202.09368, section 3.3: A maximises <S, A> + lambda · H(A) under the sums that C and b ask
for (entropy_program.py), each expert takes the C largest of its row of A, and weighs its answer with the raw score S of
expert choice. lambda is 0.001, at most 100 iterations; EC-CAP2 and EC-CAP3 have b = 2 and b = 3, c is 2. The paper
projects (Dykstra), this project ascends the dual of the same program.

This project's reading. A is fractional here and there, so the final choice of the C largest leaves a few tokens with
more than b experts; strict_cap takes the excess away and fills up, which the paper does not do. C is rounded as in
expert_choice. In a group so small that C, at least 1, does not fit (E · C > b · tokens) the cap is the least that does.
A score that is not finite counts as 0. Ties go to the earliest token.
With the paper's lambda the program is not solved yet after 100 iterations (rows of A measured up to half a token
short in groups of 8, a fifth of one in groups of 512; entropy=0.02 or iterations=1000 solves it). For 4,096 tokens
they take up to half the time of the experts of a small layer (tools/benchmark/router_decision.py; 64 experts, H 1024).
strict_cap fills place by place: with tokens all alike, thousands of short steps, about as long again.

Guaranteed: every expert has exactly C different tokens of each group; with strict_cap no token has more than b experts,
without it few have. Not causal: whether a token is taken depends on later tokens, and on other sequences of its group,
in training and in evaluation. Do not use it in a decoder, except to study that (--moe-allow-noncausal).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.routers.entropy_program import capped_wishes, within_cap
from megatron_moe.moe.routers.expert_choice import ExpertChoiceOptions, ExpertChoiceRouter
from megatron_moe.moe.routers.group_table import group_table


@dataclass(frozen=True, kw_only=True)
class ECCapOptions(ExpertChoiceOptions):
    """What ec_cap alone can be told."""

    cap: int = option(2, "b: most experts of a token; 2 and 3 in the paper", at_least=1)
    strict_cap: bool = option(False, "no token over the cap at all, where the paper's rounding leaves a few")
    entropy: float = option(0.001, "lambda: weight of the entropy that smoothes the linear program", above=0)
    iterations: int = option(100, "most iterations of the solver", at_least=1)


class ECCapRouter(ExpertChoiceRouter):
    """See the file's first lines."""

    Options = ECCapOptions
    is_causal = False
    facts = Facts(
        paper="Expert Choice, arXiv:2202.09368, section 3.3",
        chooses="expert",
        batch_independent=True,
        scores="softmax before the choice",
        weights="raw score",
        capacity="exactly T·c/E, c = 2; at most b experts per token",
        good_for="encoders: perfect balance, and a bound on what one token may cost",
    )
    options: ECCapOptions

    def setup(self) -> None:
        super().setup()
        capacity, cap, experts = self.options.capacity, self.options.cap, self.config.num_experts
        if capacity > cap:
            raise ConfigError(
                f"--moe-router-options capacity={capacity:g} asks for more experts per token than cap={cap} allows; "
                f"use capacity={cap} or less, or a cap of at least {math.ceil(capacity)}."
            )
        if cap >= experts:
            raise ConfigError(
                f"--moe-router-options cap={cap} limits nothing with --num-experts {experts}; use a smaller cap, or "
                f"--moe-router-type expert_choice."
            )

    def choose(self, scores: Tensor, info: TokenInfo) -> tuple[Tensor, Tensor]:
        """Both (num_groups, E, C): the tokens of each expert, as local rows, and whether it takes them.

        C is that of a whole group without padding; a row outside 0..T-1 belongs to another rank.
        """
        table = group_table(scores.nan_to_num(0.0), info, self.group_axis, absent=0.0)
        most = int(self.places(torch.tensor(info.group_size)))  # on the host: nothing waits
        takes = self.places(info.group_tokens)
        least_cap = -(-takes * self.config.num_experts // info.group_tokens.clamp(min=1))
        cap = least_cap.clamp(min=self.options.cap)
        wishes = capped_wishes(
            table.scores.transpose(1, 2),
            table.is_token,
            takes,
            cap,
            most=most,
            entropy=self.options.entropy,
            iterations=self.options.iterations,
        )
        # stable: among equals the earlier token
        ranked = wishes.sort(dim=2, descending=True, stable=True).indices[..., :most]
        taken = (torch.arange(most, device=ranked.device) < takes[:, None, None]).expand_as(ranked)
        if self.options.strict_cap:
            chosen = torch.zeros_like(wishes, dtype=torch.bool).scatter(2, ranked, taken)
            chosen = within_cap(wishes, chosen, takes, cap)
            ranked = chosen.to(torch.int8).sort(dim=2, descending=True, stable=True).indices[..., :most]
        return table.rows[:, None].expand(*ranked.shape[:2], -1).gather(2, ranked), taken
