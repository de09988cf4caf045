"""The decoder-only family as pipeline stages."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.embedding import VocabularyEmbedding, VocabularyHead, project_to_vocabulary
from megatron_moe.layers.norm import Norm
from megatron_moe.models.depth import build_block
from megatron_moe.models.transformer import LayerSpec
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.moe.sparse_layer import SparseLayer
from megatron_moe.parallel.collectives import shares
from megatron_moe.parallel.state import ParallelState


@dataclass(frozen=True)
class GPTSpec:
    """A whole decoder-only model."""

    layers: tuple[LayerSpec, ...]
    hidden_size: int
    vocab_size: int  # ids that mean something
    padded_vocab_size: int
    tied: bool
    init_std: float
    normalization: str
    norm_epsilon: float
    dtype: torch.dtype
    sequence_parallel: bool
    recompute: bool = False  # run each layer again in the backward pass instead of keeping its tensors


@dataclass(frozen=True)
class StageOutput:
    """What a stage passes on, and what its MoE layers report."""

    tensors: dict[str, Tensor]  # "hidden", or "logits" (S/cp, B, V/tp) from the last stage
    reports: list[RoutingReport]


class GPTStage(nn.Module):
    """A run of layers; the first stage also embeds, the last one also projects to the vocabulary."""

    def __init__(self, spec: GPTSpec, layer_range: range, state: ParallelState, *, first: bool, last: bool) -> None:
        super().__init__()
        self.spec = spec
        self.tp = state.tp
        self.first = first
        self.last = last
        if first or (last and spec.tied):
            self.embedding = VocabularyEmbedding(
                spec.padded_vocab_size, spec.hidden_size, state.tp, std=spec.init_std, tied=spec.tied, dtype=spec.dtype
            )
        self.layers = nn.ModuleDict({str(index): build_block(spec.layers[index], state) for index in layer_range})
        if last:
            partial = spec.sequence_parallel
            self.final_norm = Norm(
                spec.hidden_size, spec.normalization, spec.norm_epsilon, partial=partial, dtype=spec.dtype
            )
            if not spec.tied:
                self.output = VocabularyHead(
                    spec.padded_vocab_size, spec.hidden_size, state.tp, std=spec.init_std, dtype=spec.dtype
                )

    def edge(self, ctx: ForwardContext) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that travels between stages in this pass."""
        rows = ctx.view.num_rows
        local = shares(rows, self.tp.size)[self.tp.rank] if ctx.sequence_parallel else rows
        return {"hidden": ((local, ctx.view.num_samples, self.spec.hidden_size), self.spec.dtype)}

    def forward(self, tensors: dict[str, Tensor], ctx: ForwardContext) -> StageOutput:
        """tensors: what the stage before passed on; empty for the first stage."""
        hidden = self.embedding(ctx) if self.first else tensors["hidden"]
        reports = []
        for layer in self.layers.values():
            hidden, report = self._run(layer, hidden, ctx)
            if report is not None:
                reports.append(report)
        if not self.last:
            return StageOutput({"hidden": hidden}, reports)
        weight = self.embedding.weight if self.spec.tied else self.output.weight
        logits = project_to_vocabulary(self.final_norm(hidden), weight, self.tp, ctx)
        return StageOutput({"logits": logits}, reports)

    def _run(self, layer: nn.Module, hidden: Tensor, ctx: ForwardContext) -> tuple[Tensor, RoutingReport | None]:
        if not (self.spec.recompute and ctx.train):
            found: tuple[Tensor, RoutingReport | None] = layer(hidden, ctx)
            return found
        # draws are keyed, so that there is no generator to restore; whole layers, for collectives must pair up
        with set_checkpoint_early_stop(False):
            found = checkpoint(layer, hidden, ctx, use_reentrant=False, preserve_rng_state=False)
        return found

    def moe_layers(self) -> dict[int, SparseLayer]:
        """The sparse layers of this stage by global index."""
        found = {int(index): layer.sparse for index, layer in self.layers.items()}
        return {index: sparse for index, sparse in found.items() if isinstance(sparse, SparseLayer)}
