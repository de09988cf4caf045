"""SMEAR: the experts' parameters are averaged for each example, and the example passes through that one expert.

Source: Muqeeth et al., arXiv:2306.03745, section 3: p = softmax(router(mean of the example's hidden states)), one
merged expert Σ_e p_e · theta_e. From memory: expert dropout on p (dropped, then divided by what is left, 0.1 in the
paper); from public code (r-three/smear): the mean, and jitter that multiplies the router's input. This project's
reading: an example is a sample without its padding.

Guaranteed: differentiable throughout; with one expert's p at 1 it is that expert. Not causal: the mean holds all
tokens of the sample; for encoders. Merging needs all experts in one place, so that experts cannot be split over ranks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.unrouted_layer import ROUTED_ONLY, Mixed, UnroutedLayer
from megatron_moe.parallel.collectives import copy_to, reduce_from


@dataclass(frozen=True, kw_only=True)
class SmearOptions:
    """What smear alone can be told."""

    expert_dropout: float = option(0.0, "share of experts left out of a sample's mean in training", at_least=0, below=1)
    jitter_eps: float = option(0.0, "training: the mean is multiplied by 1 - eps to 1 + eps", at_least=0, below=1)


class SmearLayer(UnroutedLayer):
    """See the file's first lines."""

    Options = SmearOptions
    is_causal = False
    facts = Facts(
        paper="SMEAR, arXiv:2306.03745",
        chooses="soft",
        batch_independent=True,
        scores="softmax over experts, for a whole sample",
        weights="sum to 1, of parameters",
        capacity="one merged expert",
        good_for="encoders, adapters: routing that is differentiable at the cost of one expert",
    )
    unused_fields: ClassVar[tuple[str, ...]] = (*ROUTED_ONLY, "router_topk", "token_dispatcher_type")
    options: SmearOptions

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """One expert's work for each token."""
        return 1

    @classmethod
    def check_layout(cls, parallel: ParallelConfig) -> None:
        sizes = {
            "--expert-model-parallel-size": parallel.expert_model_parallel_size,
            "--expert-tensor-parallel-size": parallel.expert_tensor,
        }
        for flag, size in sizes.items():
            if size > 1:
                raise ConfigError(
                    f"--moe-router-type smear averages the parameters of all experts, so they cannot be split over "
                    f"{flag} {size}; use 1 (--expert-tensor-parallel-size follows the tensor size unless it is given)."
                )

    def setup(self) -> None:
        site, experts = self.site, self.config.num_experts
        self.is_random = self.options.expert_dropout > 0 or self.options.jitter_eps > 0
        self.weight = self.new_weight((experts, site.hidden_size), site.init_std)
        self.experts = self.new_experts()

    def forward_flops(self, length: int) -> float:
        """The merged expert's products, and its merging from all experts once in a sequence."""
        own = super().forward_flops(length)
        return own + own * self.config.num_experts / length

    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        samples = len(info.sequence_tokens)
        rows = tokens.view(-1, samples, tokens.shape[1])
        shares = self._shares(rows, info)
        kind = tokens.dtype
        w1 = torch.einsum("be,ejfh->bjfh", shares.to(kind), self.experts.w1)
        w2 = torch.einsum("be,ehf->bhf", shares.to(kind), self.experts.w2)
        inner = self.experts.activation(torch.einsum("sbh,bjfh->sbjf", rows, w1))
        answers = torch.einsum("sbf,bhf->sbh", inner, w2).flatten(0, 1)
        real = (~info.is_padding).view(-1, samples).sum(dim=0).to(shares.dtype)
        return Mixed(answers, self.report(info, (shares.detach() * real[:, None]).sum(dim=0), {}))

    def _shares(self, rows: Tensor, info: TokenInfo) -> Tensor:
        """(B, E) wide: how much of each expert is in a sample's. The same on all ranks that share the sample."""
        samples = rows.shape[1]
        real = ~info.is_padding.view(-1, samples)
        sums = (rows.to(self.site.wide) * real[..., None]).sum(dim=0)
        # each rank goes on with its own tokens, so what comes back is partial
        sums = copy_to(reduce_from(sums, self.group_axis), self.group_axis)
        mean = sums / info.sequence_tokens.clamp(min=1)[:, None]
        keys = info.sequence_keys
        if info.train and self.options.jitter_eps:
            draws = info.random.at(stream="jitter").uniform_rows(keys, mean.shape[1]).to(mean.dtype)
            mean = mean * (1.0 + self.options.jitter_eps * (2.0 * draws - 1.0))
        shares = (mean @ self.weight.t()).softmax(dim=1)
        if info.train and self.options.expert_dropout:
            kept = info.random.at(stream="experts").uniform_rows(keys, shares.shape[1]) >= self.options.expert_dropout
            # a sample that lost all experts keeps all
            kept = kept | ~kept.any(dim=1, keepdim=True)
            shares = shares * kept
            shares = shares / shares.sum(dim=1, keepdim=True)
        return shares
