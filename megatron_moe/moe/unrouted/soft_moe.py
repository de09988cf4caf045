"""Soft MoE: experts work on slots, each a weighted mean of all tokens, and each token's answer is one of all slots.

Source: Puigcerver et al., arXiv:2308.00951, section 2; tokens and slot parameters divided by their norms and a learned
scale as in public code (google-research/vmoe, projects/soft_moe/router.py): L = norm(x) · (scale · norm(Phi)),
dispatch weights softmax(L) over tokens, combine weights softmax(L) over slots. This project's reading: the tokens are
those of a routing group without padding (--moe-routing-group-samples, one sample by default); a norm below 1e-6 counts
as that (there 1e-6 is added to the square, which tells only on tokens near zero); the number of slots is an option,
because parameters belong to them: about tokens / experts is the paper's choice.

Guaranteed: every expert has the same load, nothing is dropped, no loss is needed. Not causal: a slot is a mean of all
tokens of its group; for encoders. The slots are shared out over the ranks that share a group, then travel to their
experts as rows do, so that expert and expert tensor parallelism work.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.dispatch.dispatcher import NodeAxes
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.layer import build_dispatcher
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.unrouted.unrouted_layer import ROUTED_ONLY, Mixed, UnroutedLayer
from megatron_moe.parallel.collectives import gather_for_partial, reduce_scatter, shares
from megatron_moe.parallel.layout import Init

EPSILON = 1e-6  # of the norms


@dataclass(frozen=True, kw_only=True)
class SoftMoEOptions:
    """What soft_moe alone can be told."""

    slots: int = option(1, "slots of each expert in a routing group; about tokens / experts in the paper", at_least=1)
    noise_std: float = option(0.0, "deviation of normal noise on the logits in training; 0 = none", at_least=0)


class SoftMoELayer(UnroutedLayer):
    """See the file's first lines."""

    Options = SoftMoEOptions
    is_causal = False
    facts = Facts(
        paper="Soft MoE, arXiv:2308.00951",
        chooses="soft",
        batch_independent=True,
        scores="softmax over tokens, and over slots",
        weights="sum to 1 over all slots",
        capacity="E·slots rows whatever the tokens",
        good_for="encoders, vision: no discrete choice, no balance to keep",
        example={"router_options": {"slots": "3"}},
    )
    unused_fields: ClassVar[tuple[str, ...]] = (*ROUTED_ONLY, "router_topk")
    options: SoftMoEOptions

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """With slots as many as tokens, one expert's work for each token."""
        return 1

    def setup(self) -> None:
        site, experts = self.site, self.config.num_experts
        self.is_random = self.options.noise_std > 0
        self.phi = self.new_weight((experts * self.options.slots, site.hidden_size), site.hidden_size**-0.5)
        self.scale = self.new_parameter((1,), Init(constant=1.0))
        self.experts = self.new_experts()
        nodes = NodeAxes(site.state.ep_node, site.state.ep_local)
        self.dispatcher = build_dispatcher(self.config.token_dispatcher_type, experts, self.ep, self.etp, nodes=nodes)

    def forward_flops(self, length: int) -> float:
        """Experts' products for all slots, and two weighted sums, over the tokens that share them."""
        experts, slots, hidden = self.config.num_experts, self.options.slots, self.site.hidden_size
        shared_by = length * self.config.routing_group_samples
        return super().forward_flops(length) * experts * slots / shared_by + 4 * experts * slots * hidden

    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        logits = self._logits(tokens, info)
        total = info.num_groups * logits.shape[1]
        parts = shares(total, self.group_axis.size)
        slots = reduce_scatter(self._weighted_sums(tokens, logits, info), self.group_axis, parts)
        mass = slots[:, -1:]
        slots = slots[:, :-1] / mass.where(mass > 0, 1.0)
        plan = self._plan(sum(parts[: self.group_axis.rank]), slots)
        batch = self.dispatcher.dispatch(slots.to(tokens.dtype), plan)
        answers = self.experts(batch.rows, batch.tokens_per_expert, ctx.weight_gradients)
        answers = self.dispatcher.combine(answers, batch)
        # every rank reads all slots of its groups, each for other tokens
        answers = gather_for_partial(answers, self.group_axis, parts).view(info.num_groups, logits.shape[1], -1)
        out = self._combine(logits.softmax(dim=1), answers, info)
        return Mixed(out.to(tokens.dtype), self.report(info, plan.tokens_per_expert(), {}))

    def _logits(self, tokens: Tensor, info: TokenInfo) -> Tensor:
        """(T, M) wide for M = E · slots."""
        wide = self.site.wide
        phi = self.scale * F.normalize(self.phi, dim=1, eps=EPSILON)
        logits = F.normalize(tokens.to(wide), dim=1, eps=EPSILON) @ phi.t()
        if info.train and self.options.noise_std:
            draws = info.random.at(stream="slot_noise").uniform_rows(info.global_keys, logits.shape[1])
            logits = logits + self.options.noise_std * torch.special.ndtri(draws).to(wide)
        return logits

    def _weighted_sums(self, tokens: Tensor, logits: Tensor, info: TokenInfo) -> Tensor:
        """(G · M, H + 1): Σ_t exp(L - max) · x over the local tokens of each group, and in the last column Σ exp."""
        samples = len(info.sequence_tokens)
        hidden = tokens.to(logits.dtype).view(-1, samples, tokens.shape[1])
        # the largest logit of anybody would do; norms bound them all by |scale|
        powers = (logits - self.scale.detach().abs()).exp().masked_fill(info.is_padding[:, None], 0.0)
        powers = powers.view(-1, samples, logits.shape[1])
        sums = torch.cat([torch.einsum("sbm,sbh->bmh", powers, hidden), powers.sum(dim=0)[..., None]], dim=2)
        whole = sums.new_zeros(info.num_groups, *sums.shape[1:])
        return whole.index_add(0, info.sequence_groups, sums).flatten(0, 1)

    def _plan(self, first: int, slots: Tensor) -> RoutingPlan:
        """Each of this rank's slots to its own expert; first: number of the first one."""
        number = torch.arange(len(slots), device=slots.device)
        return RoutingPlan(
            num_tokens=len(slots),
            num_experts=self.config.num_experts,
            token_ids=number,
            expert_ids=(first + number) // self.options.slots % self.config.num_experts,
            combine_weights=slots.new_ones(len(slots)),
        )

    def _combine(self, weights: Tensor, answers: Tensor, info: TokenInfo) -> Tensor:
        """weights (T, M), answers (G, M, H) -> (T, H) wide."""
        by_sample = answers.to(weights.dtype)[info.sequence_groups]
        rows = weights.view(-1, len(by_sample), weights.shape[1])
        return torch.einsum("sbm,bmh->sbh", rows, by_sample).flatten(0, 1)
