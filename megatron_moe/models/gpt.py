"""Both model families as pipeline stages: decoder only, and encoder-decoder (T5, Switch, ST-MoE).

The layers of the encoder come first and those of the decoder after them in one list, of which a stage is a run: the
two may be cut anywhere, and one stage may hold parts of both, or no layer at all: the embedding or the head alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.layers.embedding import VocabularyEmbedding, VocabularyHead, project_to_vocabulary
from megatron_moe.layers.norm import Norm
from megatron_moe.layers.parallel_linear import column_linear, enter_parallel
from megatron_moe.layers.recompute import Recomputation, run_again
from megatron_moe.layers.relative_bias import RelativeBias
from megatron_moe.layers.weight_gradients import enter_layer
from megatron_moe.models.depth import build_block
from megatron_moe.models.transformer import LayerSpec
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.moe.sparse_layer import SparseLayer
from megatron_moe.parallel.collectives import shares
from megatron_moe.parallel.state import ParallelState


@dataclass(frozen=True)
class GPTSpec:
    """A whole model."""

    layers: tuple[LayerSpec, ...]  # of the encoder, if there is one, then of the decoder
    hidden_size: int
    vocab_size: int  # ids that mean something
    padded_vocab_size: int
    tied: bool
    init_std: float
    normalization: str
    norm_epsilon: float
    dtype: torch.dtype
    sequence_parallel: bool
    tensor_overlap: bool = False  # collectives over tp travel beside products, in training
    recompute: Recomputation = Recomputation()
    relative_buckets: int = 0  # of relative positions; 0: there are none
    relative_distance: int = 0

    @property
    def encoder_layers(self) -> int:
        """How many of the layers, the first ones, are the encoder's."""
        return sum(layer.stream == "encoder" for layer in self.layers)

    def passed_on(self, start: int, encoded: bool = False) -> tuple[str, ...]:
        """What a stage that begins with layer `start` is given: a hidden state, the encoder's output, or both.

        encoded: the encoder does not run any more.
        """
        encoder, layers = self.encoder_layers, len(self.layers)
        if encoded:
            return ("hidden",) if start > encoder else ()
        if encoder == 0 or start < encoder or start == layers:
            return ("hidden",)
        return ("memory",) if start == encoder else ("hidden", "memory")


@dataclass(frozen=True)
class StageOutput:
    """What a stage passes on, and what its MoE layers report."""

    tensors: dict[str, Tensor]  # "hidden", "memory"; from the last stage "logits" (S/cp, B, V/tp), or "normed" before
    reports: list[RoutingReport]


class GPTStage(nn.Module):
    """A run of layers; the first of a stream also embeds, the last stage also projects to the vocabulary.

    parts: the layers of every stage of the pipeline.   number: which of them this is.
    """

    def __init__(self, spec: GPTSpec, parts: Sequence[range], number: int, state: ParallelState) -> None:
        super().__init__()
        layers = parts[number]
        self.spec = spec
        self.parts = parts
        self.number = number
        self.tp = state.tp
        self.first = number == 0
        self.last = number == len(parts) - 1
        between = spec.encoder_layers > 0 and spec.encoder_layers in layers
        if self.first or between or (self.last and spec.tied):
            # two streams, or the two ends of a pipeline, have one embedding
            shared = spec.tied or spec.encoder_layers > 0
            self.embedding = VocabularyEmbedding(
                spec.padded_vocab_size, spec.hidden_size, state.tp, std=spec.init_std, tied=shared, dtype=spec.dtype
            )
        self.layers = nn.ModuleDict({str(index): build_block(spec.layers[index], state) for index in layers})
        if spec.relative_buckets:
            self.relative_bias = nn.ModuleDict({stream: self._bias(stream, state) for stream in self._streams()})
        if spec.encoder_layers and spec.encoder_layers - 1 in layers:
            self.encoder_norm = self._norm()
        if self.last:
            self.final_norm = self._norm()
            if not spec.tied:
                self.output = VocabularyHead(
                    spec.padded_vocab_size, spec.hidden_size, state.tp, std=spec.init_std, dtype=spec.dtype
                )

    def _streams(self) -> list[str]:
        return sorted({layer.stream for layer in self.spec.layers})

    def _norm(self) -> Norm:
        spec = self.spec
        return Norm(
            spec.hidden_size,
            spec.normalization,
            spec.norm_epsilon,
            partial=spec.sequence_parallel,
            dtype=spec.dtype,
        )

    def _bias(self, stream: str, state: ParallelState) -> RelativeBias:
        """Few numbers: every stage has those of both streams."""
        shape = next(layer.attention for layer in self.spec.layers if layer.stream == stream)
        return RelativeBias(
            shape.num_heads,
            state.tp,
            num_buckets=self.spec.relative_buckets,
            max_distance=self.spec.relative_distance,
            causal=shape.causal,
            std=self.spec.init_std,
            dtype=self.spec.dtype,
        )

    def edge(self, number: int, ctx: ForwardContext) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that stage `number` is given in this pass."""
        start = self.parts[number].start
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in self.spec.passed_on(start, ctx.encoded):
            encodes = name == "memory" or start < self.spec.encoder_layers
            view = ctx.source if encodes else ctx.view
            assert view is not None
            found[name] = (self._shape(view, ctx.sequence_parallel), self.spec.dtype)
        return found

    def _shape(self, view: SequenceView, sequence_parallel: bool) -> tuple[int, int, int]:
        rows = shares(view.num_rows, self.tp.size)[self.tp.rank] if sequence_parallel else view.num_rows
        return rows, view.num_samples, self.spec.hidden_size

    def forward(self, tensors: dict[str, Tensor], ctx: ForwardContext) -> StageOutput:
        """tensors: what the stage before passed on; empty for the first stage."""
        if ctx.await_weights is not None:
            ctx.await_weights(None)
        hidden, memory = tensors.get("hidden"), tensors.get("memory")
        reports: list[RoutingReport] = []
        encoder = self.spec.encoder_layers
        part = self.parts[self.number]
        if part.start < encoder and not ctx.encoded:
            hidden = self._through("encoder", hidden, self._context("encoder", ctx, None), reports)
        if encoder and encoder - 1 in part and not ctx.encoded:
            hidden, memory = None, self.encoder_norm(hidden)
        if part.stop > encoder or not encoder:
            hidden = self._through("decoder", hidden, self._context("decoder", ctx, memory), reports)
        if not self.last:
            carried = {"hidden": hidden, "memory": memory}
            names = self.spec.passed_on(part.stop, ctx.encoded)
            return StageOutput({name: tensor for name in names if (tensor := carried[name]) is not None}, reports)
        assert hidden is not None
        normed = self._before_head(hidden)
        weight, split = self._head, ctx.split_over(self.tp)
        if not ctx.with_logits:
            # several products will use it
            return StageOutput({"normed": enter_parallel(normed, split)}, reports)
        logits = column_linear(normed, weight, weight.shape[0], split, ctx.weight_gradients)
        return StageOutput({"logits": logits}, reports)

    def _context(self, stream: str, ctx: ForwardContext, memory: Tensor | None) -> ForwardContext:
        """What the layers of a stream are told."""
        if stream == "encoder":
            assert ctx.source is not None
            ctx = replace(ctx, view=ctx.source, source=None, cache=None)
        bias = self.relative_bias[stream](ctx.view) if self.spec.relative_buckets else None
        return replace(ctx, memory=memory, bias=bias)

    def _through(self, stream: str, hidden: Tensor | None, ctx: ForwardContext, reports: list[RoutingReport]) -> Tensor:
        """The stream's layers of this stage; a stream that begins here is embedded."""
        found: Tensor = self.embedding(ctx) if hidden is None else hidden
        own = [name for name in self.layers if self.spec.layers[int(name)].stream == stream]
        for names, again in self.spec.recompute.chunks(own):
            if again and ctx.train:
                found, new = run_again(self._run, names, found, ctx)
            else:
                found, new = self._run(names, found, ctx)
            reports += new
        return found

    def _run(self, names: list[str], hidden: Tensor, ctx: ForwardContext) -> tuple[Tensor, list[RoutingReport]]:
        """Some layers, one after the other."""
        reports = []
        for name in names:
            if ctx.await_weights is not None:
                ctx.await_weights(int(name))
            hidden = enter_layer(hidden, int(name), ctx.weight_gradients)
            hidden, report = self.layers[name](hidden, ctx)
            if report is not None:
                reports.append(report)
        return hidden, reports

    def _before_head(self, hidden: Tensor) -> Tensor:
        """What is multiplied with the vocabulary, split over tp as hidden is."""
        hidden = self.final_norm(hidden)
        if self.spec.tied and self.spec.encoder_layers:
            # an embedding of unit deviation makes large logits  [T5, arXiv:1910.10683]
            hidden = hidden * self.spec.hidden_size**-0.5
        return hidden

    @property
    def _head(self) -> Tensor:
        weight: Tensor = self.embedding.weight if self.spec.tied else self.output.weight
        return weight

    def logits(self, normed: Tensor, ctx: ForwardContext) -> Tensor:
        """(R, B, V/tp) of some rows of "normed", which are whole on each rank of tp, on the last stage."""
        return project_to_vocabulary(normed, self._head, ctx)

    def moe_layers(self) -> dict[int, SparseLayer]:
        """The sparse layers of this stage by global index."""
        found = {int(index): layer.sparse for index, layer in self.layers.items()}
        return {index: sparse for index, sparse in found.items() if isinstance(sparse, SparseLayer)}
