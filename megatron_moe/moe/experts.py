"""The experts of this rank: stacked weights, one grouped product for each matrix."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megatron_moe.layers.recompute import remade, run_again
from megatron_moe.layers.weight_gradients import WeightGradients
from megatron_moe.moe.expert_dropout import ExpertDropout
from megatron_moe.ops.activation import ACTIVATIONS
from megatron_moe.ops.grouped_gemm import grouped_linear
from megatron_moe.parallel.collectives import copy_to, gather_for_partial, reduce_from
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class Draws:
    """What dropout is drawn by: the key of each row's token, (R,) int64, and the pass's stream."""

    tokens: Tensor
    random: KeyedRandom


class Experts(nn.Module):
    """w1 (E, 2, F, H), gate and up; w2 (E, H, F): experts split over ep, inner width over etp."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        ffn_size: int,
        activation: str,
        ep: Axis,
        etp: Axis,
        *,
        init_std: float,
        output_std: float,
        dtype: torch.dtype,
        bias: str = "none",
        dropout: float = 0.0,
        recompute_activation: bool = False,
    ) -> None:
        """bias: "additive" or "multiplicative", a vector of width F for each expert.  [ST-MoE, appendix C]"""
        super().__init__()
        branches, self.activation = ACTIVATIONS[activation]
        self.hidden_size = hidden_size
        self.ffn_size = ffn_size
        self.ep, self.etp = ep, etp

        def weight(shape: tuple[int, ...], ffn_dim: int, std: float) -> nn.Parameter:
            splits = {0: "ep", ffn_dim: "etp"}
            layout = ParamLayout(shape, splits, reduce_over="edp", stacked=True, init=Init(std=std))
            return new_parameter(layout, ep, etp, dtype=dtype)

        self.w1 = weight((num_experts, branches, ffn_size, hidden_size), 2, init_std)
        self.w2 = weight((num_experts, hidden_size, ffn_size), 2, output_std)
        self.bias_kind = bias
        if bias != "none":
            splits = {0: "ep", 1: "etp"}
            start = Init(constant=1.0 if bias == "multiplicative" else 0.0)
            layout = ParamLayout(
                (num_experts, ffn_size), splits, reduce_over="edp", stacked=True, decay=False, init=start
            )
            self.bias = new_parameter(layout, ep, etp, dtype=dtype)
        self.dropout = ExpertDropout(dropout, etp) if dropout else None
        self.recompute_activation = recompute_activation

    def forward(
        self,
        rows: Tensor,
        tokens_per_expert: list[int],
        gradients: WeightGradients | None,
        draws: Draws | None = None,
    ) -> Tensor:
        """rows (R, H) sorted by expert -> (R, H), a partial sum when etp > 1.   draws: None drops nothing."""
        _, branches, local_ffn, _ = self.w1.shape
        sink = None if gradients is None else gradients.add
        inner = grouped_linear(rows, self.w1, branches * local_ffn, tokens_per_expert, sink)
        inner = inner.view(inner.shape[0], branches, local_ffn)
        second = partial(grouped_linear, weight=self.w2, out_features=self.hidden_size, counts=tokens_per_expert)
        if not (self.recompute_activation and torch.is_grad_enabled()):
            return second(self._between(inner, tokens_per_expert, draws), sink=sink)
        joined = run_again(self._between, inner, tokens_per_expert, draws)
        with remade(joined, lambda: self._between(inner, tokens_per_expert, draws)):
            return second(joined, sink=sink)

    def _between(self, inner: Tensor, tokens_per_expert: list[int], draws: Draws | None) -> Tensor:
        """What stands between the two products: (R, branches, F/etp) -> (R, F/etp)."""
        joined = self.activation(inner)
        if self.bias_kind == "none" and draws is None:
            return joined
        return self._finish(joined, tokens_per_expert, draws)

    def _finish(self, joined: Tensor, tokens_per_expert: list[int], draws: Draws | None) -> Tensor:
        """Bias and dropout between the two products: (R, F/etp)."""
        counts = torch.tensor(tokens_per_expert, device=joined.device)
        local = torch.arange(len(counts), device=joined.device)
        experts = local.repeat_interleave(counts, output_size=joined.shape[0])
        if self.bias_kind == "additive":
            joined = joined + self.bias[experts]
        elif self.bias_kind == "multiplicative":
            joined = joined * self.bias[experts]
        if draws is None or self.dropout is None:
            return joined
        return self.dropout(joined, draws.tokens, experts + self.ep.rank * len(counts), draws.random)

    def mean_keys(self) -> Tensor:
        """(E, H) wide: the mean row of each expert's gate matrix, of all experts on all ranks, with gradient.

        The mean of an expert's pre-activations is the token's product with it.  [Avg-K, arXiv:2305.13999]
        """
        wide = torch.promote_types(self.w1.dtype, torch.float32)
        sums = self.w1[:, 0].to(wide).sum(dim=1)
        # each rank of etp holds some rows of an expert, and routes other tokens with their mean
        sums = copy_to(reduce_from(sums, self.etp), self.etp)
        return gather_for_partial(sums / self.ffn_size, self.ep, [sums.shape[0]] * self.ep.size)
