"""One step: the program that the pipeline plays, and what it found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from megatron_moe.data.batch import Batch, Inputs, Stream
from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.layers.context_parallel import context_rows
from megatron_moe.layers.weight_gradients import Deferred, Immediate
from megatron_moe.models.gpt import GPTStage, StageOutput
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.collectives import nothing
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.executor import Played
from megatron_moe.pipeline.transfer import Edge
from megatron_moe.training.objective import (
    GlobalCounts,
    Objective,
    StreamCounts,
    Targets,
    TokenLosses,
    chunked_losses,
    token_losses,
)


def view_of(
    stream: Inputs, sample_ids: Tensor, state: ParallelState, device: torch.device, num_passes: int = 1
) -> SequenceView:
    """A stream as the layers see it, the samples num_passes times one after the other.

    The stream is still on the host, where the packing flag is read.
    """
    prefix = stream.prefix if isinstance(stream, Stream) else None
    segmented = bool((stream.segments != 0).any())
    length = stream.tokens.shape[1]
    return SequenceView(
        tokens=stream.tokens.t().repeat(1, num_passes).to(device),
        positions=stream.position_ids.t().repeat(1, num_passes).to(device),
        segments=stream.segments.t().repeat(1, num_passes).to(device),
        sample_ids=sample_ids.repeat(num_passes).to(device),
        rows=context_rows(length, state.cp.size, state.cp.rank, device),
        segmented=segmented,
        num_passes=num_passes,
        prefix=None if prefix is None else prefix.t().repeat(1, num_passes).to(device),
    )


class Counting:
    """Counts of a global batch that are still being summed over the ranks."""

    def __init__(self, summing: Arrival, streams: Sequence[str], num_passes: int, encoder_layers: int) -> None:
        self._summing = summing
        self._streams = streams
        self._num_passes = num_passes
        self._encoder_layers = encoder_layers

    @cached_property
    def result(self) -> GlobalCounts:
        """Waits for it, and for the device."""
        total, *often = self._summing.wait().tolist()
        numbers = iter(self._num_passes * int(number) for number in often)
        streams = {name: StreamCounts(next(numbers), next(numbers), next(numbers)) for name in self._streams}
        return GlobalCounts(total, streams["decoder"], streams.get("encoder"), self._encoder_layers)


def count_batches(
    batches: Sequence[Batch],
    group_samples: Mapping[str, int],
    num_passes: int,
    state: ParallelState,
    device: torch.device,
    encoder_layers: int = 0,
) -> Counting:
    """Counts over the global batch: each data-parallel rank brings its own microbatches.

    group_samples: samples of a routing group, by stream.
    """
    loss_tokens = sum(float(batch.decoder.loss_mask.sum()) for batch in batches)
    own = [loss_tokens, *(number for name, size in group_samples.items() for number in _count(batches, name, size))]
    summing = state.dp.comm.start_all_reduce_(torch.tensor(own, dtype=torch.float64, device=device))
    return Counting(summing, list(group_samples), num_passes, encoder_layers)


def _count(batches: Sequence[Batch], stream: str, group_samples: int) -> tuple[int, int, int]:
    """Tokens, routing groups and samples of one stream here."""
    tokens = sum(int((batch.streams[stream].segments >= 0).sum()) for batch in batches)
    groups = sum(-(-batch.sample_ids.shape[0] // group_samples) for batch in batches)
    return tokens, groups, sum(batch.sample_ids.shape[0] for batch in batches)


@dataclass
class Findings:
    """What the forward passes of this rank found, summed over its microbatches; shares, not yet summed over ranks."""

    loss: Tensor | None = None  # Σ loss · mask, on the last stage only
    consistency: Tensor | None = None  # Σ divergence · mask of two passes, there
    reports: dict[int, RoutingReport] = field(default_factory=dict)  # by layer

    def add_losses(self, losses: TokenLosses) -> None:
        self.loss = _plus(self.loss, losses.cross_entropy)
        self.consistency = _plus(self.consistency, losses.consistency)

    def add_report(self, report: RoutingReport) -> None:
        shares = {f"loss/{loss.per}/{name}": loss.share.detach() for name, loss in report.aux_losses.items()}
        stats = {**report.stats, **shares}
        known = self.reports.get(report.layer)
        if known is not None:
            stats = {name: value + known.stats[name] for name, value in stats.items()}
        self.reports[report.layer] = RoutingReport(report.layer, report.aux_losses, stats)


def _plus(known: Tensor | None, share: Tensor | None) -> Tensor | None:
    if share is None:
        return known
    return share.detach() if known is None else known + share.detach()


class StepProgram:
    """The microbatches of one step on this rank's stages."""

    def __init__(
        self,
        stages: Sequence[GPTStage],
        batches: Sequence[Batch],
        counts: Counting,
        state: ParallelState,
        random: KeyedRandom,
        device: torch.device,
        *,
        train: bool,
        objective: Objective,
        aux_share: float = 1.0,
        chunk: int | None = None,
        await_weights: Callable[[int | None], None] | None = None,
        layer_done: Callable[[int, int], None] | None = None,
        uses_sinks: bool = True,
    ) -> None:
        """random: at (seed, step).   aux_share: what each layer's auxiliary losses are multiplied by.   chunk: tokens
        whose logits are in memory at once; None: all.   uses_sinks: products hand their weight gradients over instead
        of returning them to autograd.   await_weights: as in ForwardContext.   layer_done: told stage and layer in a
        stage's last backward pass, by sinks."""
        self._uses_sinks = uses_sinks and train
        self._chunk = chunk
        self._await_weights = await_weights
        self._layer_done = layer_done
        self._stages = {stage.number: stage for stage in stages}
        self._batches = batches
        self._views = [self._views_of(batch, state, objective.num_passes, device) for batch in batches]
        self._objective = objective
        self._aux_share = aux_share
        self._counts = counts
        self._state = state
        self._random = random
        self._device = device
        self._train = train
        self.findings = Findings()

    @staticmethod
    def _views_of(batch: Batch, state: ParallelState, num_passes: int, device: torch.device) -> dict[str, SequenceView]:
        return {
            name: view_of(stream, batch.sample_ids, state, device, num_passes) for name, stream in batch.streams.items()
        }

    def edge(self, stage: int, microbatch: int) -> Edge:
        return next(iter(self._stages.values())).edge(stage, self._context(microbatch, None))

    def _context(self, microbatch: int, sink: Immediate | Deferred | None) -> ForwardContext:
        any_stage = next(iter(self._stages.values()))
        return ForwardContext(
            view=self._views[microbatch]["decoder"],
            source=self._views[microbatch].get("encoder"),
            random=self._random,
            train=self._train,
            sequence_parallel=any_stage.spec.sequence_parallel,
            tensor_overlap=any_stage.spec.tensor_overlap,
            weight_gradients=sink,
            await_weights=self._await_weights,
            with_logits=self._chunk is None,
        )

    def forward(
        self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool, last: bool = False
    ) -> Played:
        done = partial(self._layer_done, stage) if last and self._layer_done is not None else None
        sink = Deferred(done) if split else Immediate(done)
        ctx = self._context(microbatch, sink if self._uses_sinks else None)
        output = self._stages[stage](inputs, ctx)
        losses = self._losses(self._stages[stage], microbatch, output, ctx)
        outputs = {} if self._stages[stage].last else output.tensors
        if isinstance(sink, Deferred):
            return Played(outputs, losses, sink.run, sink.run_one)
        return Played(outputs, losses, nothing)

    def _losses(self, stage: GPTStage, microbatch: int, output: StageOutput, ctx: ForwardContext) -> list[Tensor]:
        losses = []
        for report in output.reports:
            counts = self._counts.result
            self.findings.add_report(report)
            weighed = [loss for loss in report.aux_losses.values() if isinstance(loss.weight, Tensor) or loss.weight]
            losses += [loss.share * (counts.aux_scale(loss, report.layer) * self._aux_share) for loss in weighed]
        if stage.last:
            found = self._token_losses(stage, self._targets(microbatch, ctx), output, ctx)
            self.findings.add_losses(found)
            losses.append(found.objective(self._objective) / max(1.0, self._counts.result.loss_tokens))
        return losses

    def _targets(self, microbatch: int, ctx: ForwardContext) -> Targets:
        stream = self._batches[microbatch].decoder
        labels, mask = (tensor.to(self._device).t()[ctx.view.rows] for tensor in (stream.labels, stream.loss_mask))
        return Targets(labels, mask)

    def _token_losses(self, stage: GPTStage, targets: Targets, output: StageOutput, ctx: ForwardContext) -> TokenLosses:
        passes, tp, vocabulary = ctx.view.num_passes, self._state.tp, stage.spec.vocab_size

        def of_rows(normed: Tensor, start: int, stop: int) -> TokenLosses:
            return token_losses(stage.logits(normed, ctx), targets.rows(start, stop), vocabulary, tp, passes)

        if self._chunk is None:
            return token_losses(output.tensors["logits"], targets, vocabulary, tp, passes)
        rows = max(1, self._chunk // ctx.view.num_samples)
        return chunked_losses(output.tensors["normed"], rows, of_rows, train=self._train)
