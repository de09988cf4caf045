"""What memories of single cells share: tables split by rows over ep, and weighted sums of the rows that are read."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option, settings_of
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.moe.unrouted.unrouted_layer import ROUTED_ONLY, UnroutedLayer
from megatron_moe.ops.activation import ACTIVATIONS
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter


@dataclass(frozen=True, kw_only=True)
class CellOptions:
    """How many cells a token reads."""

    active_cells: int | None = option(
        None, "cells of a token; none = router_topk times the width of an expert", at_least=1
    )


@dataclass(frozen=True)
class Reads:
    """Which of this rank's cells the T' tokens read: N reads, token after token."""

    cells: Tensor  # (N,) int64, rows of this rank's tables
    starts: Tensor  # (T',) where each token's reads begin
    weights: Tensor  # (N,) wide, with gradient


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
        self.num_cells = self.count_cells()
        self.values = self.new_table(self.site.hidden_size, self.value_std())
        self.first_cell = self.ep.rank * self.values.shape[0]
        self.make_parameters()

    @abstractmethod
    def make_parameters(self) -> None:
        """Check the options; make what cells are chosen by."""

    def count_cells(self) -> int:
        """d_m, a multiple of the number of experts."""
        return self.config.num_experts * self.site.ffn_size

    def value_std(self) -> float:
        """Deviation of the first values: those of a feed-forward layer's second matrix."""
        return self.site.output_std

    def new_table(self, width: int, std: float) -> nn.Parameter:
        """(d_m / ep, width) of the model's type."""
        layout = ParamLayout((self.num_cells, width), splits={0: "ep"}, reduce_over="edp", init=Init(std=std))
        return new_parameter(layout, self.ep, dtype=self.site.dtype)

    def active_cells(self, given: int | None, option: str) -> int:
        """k: what the option of that name says, or router_topk runs as wide as an expert. ConfigError if too many."""
        topk = self.config.router_topk
        if given is None:
            return topk * (self.num_cells // self.config.num_experts)
        setting = settings_of(MoEConfig)["router_topk"]
        if topk != setting.default:
            raise ConfigError(
                f"{setting.flag} {topk} has no effect beside --moe-router-options {option}={given}; "
                f"leave one of them out."
            )
        if given > self.num_cells:
            raise ConfigError(
                f"--moe-router-options {option}={given} asks for more than the memory's {self.num_cells} cells; "
                f"use {self.num_cells} or fewer."
            )
        return given

    def sum_of_values(self, reads: Reads) -> Tensor:
        """(T', H): Σ weight · value of each token's reads, in the values' dtype. No row is copied."""
        weights = reads.weights.to(self.values.dtype)
        return F.embedding_bag(reads.cells, self.values, reads.starts, mode="sum", per_sample_weights=weights)

    def reads_of(self, cells: Tensor, weights: Tensor) -> Reads:
        """Those that fall to this rank of all tokens' reads: cells (T', k) in the whole memory, weights (T', k)."""
        tokens, k = cells.shape
        if self.values.shape[0] == self.num_cells:
            return Reads(cells.flatten(), k * torch.arange(tokens, device=cells.device), weights.flatten())
        local = cells - self.first_cell
        here = (local >= 0) & (local < self.values.shape[0])
        return Reads(local[here], starts_of(here), weights.masked_select(here))

    def uses(self, cells: Tensor, counted: Tensor) -> Tensor:
        """(E,) int64: uses of each run of cells as wide as an expert.

        cells: int64 numbers in the whole memory.   counted: bool of the same shape.
        """
        experts = self.config.num_experts
        runs = (cells // (self.num_cells // experts)).masked_fill(~counted, experts).flatten()
        found = runs.new_zeros(experts + 1)
        return found.scatter_add_(0, runs, torch.ones_like(runs))[:-1]


def starts_of(chosen: Tensor) -> Tensor:
    """(T',) where each row's entries begin in the list of all that are True: chosen (T', cells) bool."""
    counts = chosen.sum(dim=1)
    return counts.cumsum(0) - counts


def plain_activation(config: MoEConfig, name: str) -> str:
    """The activation of a cell, which has one key: what decides is also what is activated.

    A gated activation needs a second product, and its plain part alone would be another model than was asked for:
    ConfigError.
    """
    branches, _ = ACTIVATIONS[name]
    if branches != 1:
        plain = " or ".join(known for known, (count, _) in ACTIVATIONS.items() if count == 1)
        raise ConfigError(
            f"the activation {name} has a gate, but a cell of --moe-router-type {config.router_type} has one key; "
            f"give --moe-activation {plain}."
        )
    return name


def activate(name: str, scores: Tensor) -> Tensor:
    """The feed-forward non-linearity, element by element."""
    return ACTIVATIONS[name][1](scores.unsqueeze(-2))
