"""Mixture-of-Depths: a whole block, attention and feed-forward, works for the best few tokens of each sequence.

Source: Raposo et al., arXiv:2404.02258, sections 3.3 to 3.5, from memory: r_t = w · x_t, the C = capacity · S tokens
with the largest r pass through the block and get x + r · f(x), the others x; only chosen tokens are keys and values;
capacity 0.125 in every other block; a binary cross-entropy with r as logit teaches r > 0 to mean "was chosen", by which
text is then generated. The paper's other way, a small network that predicts the choice, is not offered. This project's
reading: f is what the block's two branches add to the residual stream, so that r = 1 is the ordinary block; C is
rounded to the nearest and at least 1; padding is never chosen; the cross-entropy reaches the router's input too, and
weighs 0.01.

Guaranteed: exactly C tokens of a sequence are worked on (fewer when it has fewer), for the rest the block is the
identity, in attention too. Training is not causal: the choice compares with later tokens. Evaluation and generation
with inference=predictor are causal: r > 0 asks one token. Any number of them may pass then, which shows only
afterwards, so that the block runs for all. inference=top_k evaluates as in training, and cannot generate. One routing
decision for a block, so that --num-experts is 1 and --moe-layer-freq (2 in the paper) says which blocks.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.moe.capacity import exact, expert_places
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo
from megatron_moe.moe.routers.group_table import group_table
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.unrouted.unrouted_layer import ROUTED_ONLY

UNDECODABLE = (
    "--moe-router-options inference=top_k compares a token with later ones, which are not there while text is decoded; "
    "train with inference=predictor, which decides token by token, or evaluate whole sequences."
)


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsOptions:
    """What mixture_of_depths alone can be told."""

    capacity: float = option(0.125, "share of a sequence's tokens that the block works for", above=0, at_most=1)
    predictor_coeff: float = option(0.01, "weight of the cross-entropy that teaches r > 0 the choice", at_least=0)
    inference: str = option(
        "predictor",
        "evaluation: token by token where r > 0, or the best of the sequence",
        choices=("predictor", "top_k"),
    )


class MixtureOfDepthsRouter(Router):
    """See the file's first lines."""

    Options = MixtureOfDepthsOptions
    is_causal = False
    wraps_block = True
    facts = Facts(
        paper="Mixture-of-Depths, arXiv:2404.02258",
        chooses="block",
        batch_independent=True,
        scores="w · x",
        weights="raw score",
        capacity="C = 0.125·S tokens of each sequence",
        losses=("predictor 0.01",),
        good_for="less work for easy tokens, in attention as well",
        example={
            "num_experts": 1,
            "router_topk": 1,
            "ffn_hidden_size": None,
            "router_options": {"capacity": "0.3"},
        },
    )
    unused_fields: ClassVar[tuple[str, ...]] = (
        *ROUTED_ONLY,
        *("ffn_hidden_size", "activation", "extra_ffn", "token_dispatcher_type", "routing_group_samples"),
    )
    options: MixtureOfDepthsOptions

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """The block or not."""
        return 1

    @classmethod
    def check_layout(cls, parallel: ParallelConfig) -> None:
        if parallel.context_parallel_size > 1:
            raise ConfigError(
                f"--context-parallel-size {parallel.context_parallel_size} cuts sequences, but mixture_of_depths "
                f"runs attention among the best tokens of a whole sequence; use 1, and "
                f"--tensor-model-parallel-size for more room."
            )
        if parallel.expert_tensor not in (1, parallel.tensor_model_parallel_size):
            raise ConfigError(
                f"--expert-tensor-parallel-size {parallel.expert_tensor} has no effect: the one expert of "
                f"mixture_of_depths is a whole block, split over --tensor-model-parallel-size; leave it out."
            )

    def setup(self) -> None:
        if self.config.num_experts != 1:
            raise ConfigError(
                f"--num-experts {self.config.num_experts}: the one expert of mixture_of_depths is the block itself; "
                f"use 1, with --moe-router-topk 1."
            )
        if self.options.inference == "predictor" and not self.options.predictor_coeff:
            raise ConfigError(
                "--moe-router-options predictor_coeff=0 leaves the sign of r untrained, by which inference=predictor "
                "decides; use a coefficient above 0 (0.01), or inference=top_k."
            )
        super().setup()

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H), the block's input.  N = T; expert 0 is the block, 1 nobody."""
        scores = self.logits(tokens)
        predicted = self.takes_all_rows(info.train)
        chosen = (scores.detach()[:, 0] > 0) & ~info.is_padding if predicted else self._best(scores, info)
        losses = {}
        if info.train and self.options.predictor_coeff:
            found = F.binary_cross_entropy_with_logits(scores[:, 0], chosen.to(scores.dtype), reduction="none")
            share = found.masked_fill(info.is_padding, 0.0).sum()
            losses["predictor_loss"] = AuxLoss(share, self.options.predictor_coeff, per="token")
        said = scores.sigmoid()  # how sure r is that the token is among the best
        return RoutingPlan(
            num_tokens=len(tokens),
            num_experts=1,
            token_ids=torch.arange(len(tokens), device=tokens.device),
            expert_ids=(~chosen).to(torch.int64),
            combine_weights=scores[:, 0].masked_fill(~chosen, 0.0),
            aux_losses=losses,
            stats=router_stats(torch.cat([said, 1.0 - said], dim=1), info),
        )

    def places(self, length: int) -> int:
        """C of sequences of that many positions."""
        share = exact(self.options.capacity)
        return int(expert_places(torch.tensor(length), share=share, rounding="round", at_least=1))

    def takes_all_rows(self, train: bool) -> bool:
        """Whether how many tokens are chosen is known only afterwards."""
        return not train and self.options.inference == "predictor"

    def _best(self, scores: Tensor, info: TokenInfo) -> Tensor:
        """(T,) bool: among the C best of its sequence; of equals the earlier."""
        table = group_table(scores, _by_sequence(info, self.config.routing_group_samples), self.group_axis)
        count = self.places(table.is_token.shape[1])
        order = table.scores[..., 0].sort(dim=1, descending=True, stable=True).indices[:, :count]
        chosen = torch.zeros_like(table.is_token).scatter_(1, order, True) & table.is_token
        return table.local(chosen)


def _by_sequence(info: TokenInfo, group_samples: int) -> TokenInfo:
    """The same tokens with each sequence as a group of its own."""
    return replace(
        info,
        groups=info.sequences,
        keys=info.positions,
        num_groups=len(info.sequence_tokens),
        group_size=info.group_size // group_samples,
    )
