"""One step: the program that the pipeline plays, and what it found."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_moe.data.batch import Batch
from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.layers.context_parallel import context_rows
from megatron_moe.layers.weight_gradients import Deferred, Immediate
from megatron_moe.models.gpt import GPTStage, StageOutput
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.executor import Played
from megatron_moe.pipeline.transfer import Edge
from megatron_moe.training.objective import GlobalCounts, Objective, TokenLosses, token_losses


def view_of(batch: Batch, state: ParallelState, device: torch.device, num_passes: int = 1) -> SequenceView:
    """The decoder stream as the layers see it, the samples num_passes times one after the other.

    The batch is still on the host, where the packing flag is read.
    """
    stream = batch.decoder
    segmented = bool((stream.segments != 0).any())
    length = stream.tokens.shape[1]
    return SequenceView(
        tokens=stream.tokens.t().repeat(1, num_passes).to(device),
        positions=stream.position_ids.t().repeat(1, num_passes).to(device),
        segments=stream.segments.t().repeat(1, num_passes).to(device),
        sample_ids=batch.sample_ids.repeat(num_passes).to(device),
        rows=context_rows(length, state.cp.size, state.cp.rank, device),
        segmented=segmented,
        num_passes=num_passes,
    )


def count_batches(
    batches: Sequence[Batch], group_samples: int, num_passes: int, state: ParallelState, device: torch.device
) -> GlobalCounts:
    """Counts over the global batch: each data-parallel rank brings its own microbatches."""
    loss_tokens = sum(float(batch.decoder.loss_mask.sum()) for batch in batches)
    tokens = sum(int((batch.decoder.segments >= 0).sum()) for batch in batches)
    groups = sum(-(-batch.sample_ids.shape[0] // group_samples) for batch in batches)
    samples = sum(batch.sample_ids.shape[0] for batch in batches)
    found = torch.tensor([loss_tokens, tokens, groups, samples], dtype=torch.float64, device=device)
    loss_tokens, *often = state.dp.comm.all_reduce_(found).tolist()
    return GlobalCounts(loss_tokens, *(num_passes * int(number) for number in often))


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
        counts: GlobalCounts,
        state: ParallelState,
        random: KeyedRandom,
        device: torch.device,
        *,
        train: bool,
        objective: Objective,
        aux_share: float = 1.0,
    ) -> None:
        """random: at (seed, step).   aux_share: what each layer's auxiliary losses are multiplied by."""
        self._stages = dict(enumerate(stages, start=state.pp.rank))
        self._batches = batches
        self._views = [view_of(batch, state, device, objective.num_passes) for batch in batches]
        self._objective = objective
        self._aux_share = aux_share
        self._counts = counts
        self._state = state
        self._random = random
        self._device = device
        self._train = train
        self.findings = Findings()

    def edge(self, stage: int, microbatch: int) -> Edge:
        return next(iter(self._stages.values())).edge(self._context(microbatch, None))

    def _context(self, microbatch: int, sink: Immediate | Deferred | None) -> ForwardContext:
        any_stage = next(iter(self._stages.values()))
        return ForwardContext(
            view=self._views[microbatch],
            random=self._random,
            train=self._train,
            sequence_parallel=any_stage.spec.sequence_parallel,
            weight_gradients=sink,
        )

    def forward(self, stage: int, microbatch: int, inputs: dict[str, Tensor], *, split: bool) -> Played:
        sink = Deferred() if split else Immediate()
        ctx = self._context(microbatch, sink if self._train else None)
        output = self._stages[stage](inputs, ctx)
        losses = self._losses(self._stages[stage], microbatch, output, ctx)
        outputs = {} if self._stages[stage].last else output.tensors
        return Played(outputs, losses, sink.run if isinstance(sink, Deferred) else _nothing)

    def _losses(self, stage: GPTStage, microbatch: int, output: StageOutput, ctx: ForwardContext) -> list[Tensor]:
        losses = []
        for report in output.reports:
            self.findings.add_report(report)
            weighed = [loss for loss in report.aux_losses.values() if isinstance(loss.weight, Tensor) or loss.weight]
            losses += [loss.share * (self._counts.aux_scale(loss) * self._aux_share) for loss in weighed]
        if stage.last:
            stream = self._batches[microbatch].decoder
            found = token_losses(
                output.tensors["logits"],
                stream.labels.to(self._device),
                stream.loss_mask.to(self._device),
                stage.spec.vocab_size,
                self._state.tp,
                ctx,
            )
            self.findings.add_losses(found)
            losses.append(found.objective(self._objective) / max(1.0, self._counts.loss_tokens))
        return losses


def _nothing() -> None:
    return
