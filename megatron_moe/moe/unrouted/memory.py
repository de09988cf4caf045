"""What all memories of single cells share: a table of values split by rows over ep, and the sum of some of its rows."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.moe.unrouted.unrouted_layer import ROUTED_ONLY, UnroutedLayer
from megatron_moe.ops.activation import ACTIVATIONS
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter


class MemoryLayer(UnroutedLayer):
    """A memory of d_m = experts · ffn size cells, a value row each.  [arXiv:2012.14913; arXiv:2305.13999]"""

    is_causal = True
    unused_fields: ClassVar[tuple[str, ...]] = (*ROUTED_ONLY, "token_dispatcher_type")

    @classmethod
    def check_layout(cls, parallel: ParallelConfig) -> None:
        if parallel.expert_tensor > 1:
            raise ConfigError(
                f"--expert-tensor-parallel-size {parallel.expert_tensor} cannot split a memory of single cells: its "
                f"tables are split by rows over --expert-model-parallel-size; give --expert-tensor-parallel-size 1."
            )

    def setup(self) -> None:
        self.num_cells = self.config.num_experts * self.site.ffn_size
        self.values = self.new_table(self.num_cells, self.site.hidden_size, self.value_std())
        self.first_cell = self.ep.rank * self.values.shape[0]
        self.make_parameters()

    @abstractmethod
    def make_parameters(self) -> None:
        """What cells are chosen by."""

    def value_std(self) -> float:
        """Deviation of the first values: those of a feed-forward layer's second matrix."""
        return self.site.output_std

    def new_table(self, rows: int, width: int, std: float) -> nn.Parameter:
        """(rows / ep, width) of the model's type. ConfigError when the rows do not split."""
        if rows % self.ep.size:
            raise ConfigError(
                f"a memory of {rows} cells (--num-experts x --moe-ffn-hidden-size) cannot be split over "
                f"--expert-model-parallel-size {self.ep.size}; use a multiple of it."
            )
        layout = ParamLayout((rows, width), splits={0: "ep"}, reduce_over="edp", init=Init(std=std))
        return new_parameter(layout, self.ep, dtype=self.site.dtype)

    def sum_of_values(self, cells: Tensor, weights: Tensor) -> Tensor:
        """(T', H): Σ weight · value of each token's cells on this rank; a cell elsewhere counts nothing.

        cells: (T', k) int64, numbers in the whole memory.   weights: (T', k) wide, with gradient.
        """
        local = cells - self.first_cell
        here = (local >= 0) & (local < self.values.shape[0])
        kept = weights.masked_fill(~here, 0.0).to(self.values.dtype)
        return F.embedding_bag(local.where(here, 0), self.values, mode="sum", per_sample_weights=kept)

    def uses(self, cells: Tensor, counted: Tensor) -> Tensor:
        """(E,) int64: uses of each run of cells as wide as an expert.   counted: (T', k) bool."""
        runs = (cells // self.site.ffn_size).masked_fill(~counted, self.config.num_experts).flatten()
        found = runs.new_zeros(self.config.num_experts + 1)
        return found.scatter_add_(0, runs, torch.ones_like(runs))[:-1]


def plain_activation(config: MoEConfig, name: str) -> str:
    """The activation of a cell, which has one key and so no gate. ConfigError for a gated one."""
    branches, _ = ACTIVATIONS[name]
    if branches != 1:
        plain = " or ".join(known for known, (count, _) in ACTIVATIONS.items() if count == 1)
        raise ConfigError(
            f"--activation {name} has a gate, but a cell of --moe-router-type {config.router_type} has one key; "
            f"give --moe-activation {plain}."
        )
    return name


def activate(name: str, scores: Tensor) -> Tensor:
    """The feed-forward non-linearity, element by element."""
    return ACTIVATIONS[name][1](scores.unsqueeze(-2))


def largest(values: Tensor, count: int) -> Tensor:
    """Places of the largest along the last dimension, best first, of equals the first. No gradient."""
    return values.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
