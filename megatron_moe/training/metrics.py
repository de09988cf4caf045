"""Sums of a step over all ranks, and what they mean to a person."""

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_moe.parallel.collectives import gather_counts
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.objective import GlobalCounts
from megatron_moe.training.step import Findings

LayerStats = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class StepMetrics:
    """One step (or one evaluation) of the whole run: the same on every rank."""

    loss: float  # mean over the loss tokens of the global batch, in nats
    aux_losses: dict[str, float]  # unweighted, summed over layers
    layers: LayerStats  # summed over the global batch, on the host, float64


@dataclass(frozen=True)
class _Schema:
    """Which statistics each pipeline stage brings: fixed for a model, exchanged once."""

    entries: list[tuple[int, str, list[int]]]  # layer, name, shape
    sizes: list[int]  # elements of each stage


@dataclass
class MetricsReducer:
    """Adds up what ranks found. Collective over the world: every rank calls it once for each step."""

    state: ParallelState
    device: torch.device
    _schemas: list[_Schema] = field(default_factory=list)

    def reduce(self, findings: Findings, counts: GlobalCounts) -> StepMetrics:
        """Returns the step's metrics; waits for the device."""
        loss, consistency = self._losses(findings)
        layers = self._layers(findings)
        targets = max(1.0, counts.loss_tokens)
        aux = {} if consistency is None else {"consistency_loss": consistency / targets}
        for layer, stats in layers.items():
            for key, value in stats.items():
                if key.startswith("loss/"):
                    _, per, name = key.split("/")
                    aux[name] = aux.get(name, 0.0) + float(value) / counts.number_of(per, layer)
        return StepMetrics(loss / targets, aux, layers)

    def _losses(self, findings: Findings) -> tuple[float, float | None]:
        """Cross-entropy and consistency, summed over the ranks; the latter None where each sample is seen once."""
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        # all ranks of tp hold the same share: the first one speaks
        if self.state.tp.is_first:
            if findings.loss is not None:
                total[0] = findings.loss
            if findings.consistency is not None:
                total[1], total[2] = findings.consistency, 1.0
        loss, consistency, told = self.state.world.comm.all_reduce_(total).tolist()
        return loss, consistency if told else None

    def _layers(self, findings: Findings) -> LayerStats:
        named = [
            (layer, name, value)
            for layer, report in sorted(findings.reports.items())
            for name, value in sorted(report.stats.items())
        ]
        flat = [value.double().reshape(-1) for _, _, value in named]
        own = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64, device=self.device)
        own = self.state.stage.comm.all_reduce_(own.contiguous())
        if not self._schemas:
            self._schemas.append(self._exchange([(layer, name, list(value.shape)) for layer, name, value in named]))
        schema = self._schemas[0]
        whole = self.state.pp.comm.all_gather(own, schema.sizes).cpu()
        return _unpack(whole, schema.entries)

    def _exchange(self, mine: list[tuple[int, str, list[int]]]) -> _Schema:
        """Tell the other stages what this one brings."""
        text = json.dumps(mine).encode()
        sizes = gather_counts(len(text), self.state.pp, self.device)
        bytes_ = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        gathered = bytes(self.state.pp.comm.all_gather(bytes_, sizes).cpu().tolist())
        entries, elements, start = [], [], 0
        for size in sizes:
            stage = [
                (int(layer), str(name), list(shape))
                for layer, name, shape in json.loads(gathered[start : start + size])
            ]
            elements.append(sum(_elements(shape) for _, _, shape in stage))
            entries += stage
            start += size
        return _Schema(entries, elements)


def _elements(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def _unpack(flat: Tensor, entries: list[tuple[int, str, list[int]]]) -> LayerStats:
    layers: LayerStats = {}
    start = 0
    for layer, name, shape in entries:
        size = _elements(shape)
        layers.setdefault(layer, {})[name] = flat[start : start + size].view(shape)
        start += size
    # a rank with several stages brings layers from all over the model
    return dict(sorted(layers.items()))


@dataclass(frozen=True)
class RoutingSummary:
    """A dozen figures that say whether routing is well, over all MoE layers."""

    max_violation: float  # worst layer: (largest load - mean) / mean, before capacity
    drop_rate: float  # share of assignments over capacity
    unserved_rate: float  # share of tokens that no expert served
    entropy: float  # mean router entropy in nats
    dead_experts: int  # experts that no token asked for


def summarise_routing(layers: LayerStats) -> RoutingSummary | None:
    """None for a dense model."""
    if not layers:
        return None
    violation, asked, served, unserved, tokens, entropy, dead = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0
    for stats in layers.values():
        load = stats["requested"]
        violation = max(violation, float(load.max() / load.mean().clamp(min=1e-12)) - 1.0)
        asked += float(load.sum())
        served += float(stats["tokens_per_expert"].sum())
        unserved += float(stats["tokens_unserved"])
        tokens += float(stats["tokens"])
        entropy += float(stats.get("entropy_sum", torch.zeros(())))
        dead += int((load == 0).sum())
    return RoutingSummary(
        max_violation=violation,
        drop_rate=1.0 - served / max(1.0, asked),
        unserved_rate=unserved / max(1.0, tokens),
        entropy=entropy / max(1.0, tokens),
        dead_experts=dead,
    )
