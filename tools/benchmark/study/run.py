"""One run of the study: a small model trained on bytes, then measured."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import megatron_moe
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.methods import deciding_part
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.parallel.collectives import nothing
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine
from megatron_moe.training.metrics import summarise_routing
from tools.benchmark.study.text import VOCAB, Text, training_batch, trial_batches

RANKS = 4  # of the layout for which travelling rows are counted


@dataclass(frozen=True)
class Size:
    """A model and how long it learns."""

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int  # inner width of a dense layer, and of what a token uses of a sparse one
    length: int
    samples: int
    steps: int
    lr: float
    trials: int = 16  # batches of each trial


@dataclass(frozen=True)
class Arm:
    """One way of routing in the study. moe: fields of [moe]; {} is the dense model."""

    name: str
    table: str
    moe: Mapping[str, Any] = field(default_factory=dict)
    frozen: bool = False  # the router keeps its random first weights


def config_of(arm: Arm, size: Size, seed: int) -> RunConfig:
    """The run as a user would write it."""
    return RunConfig.from_dict(
        {
            "model": {
                "num_layers": size.layers,
                "hidden_size": size.hidden,
                "num_attention_heads": size.heads,
                "ffn_hidden_size": size.ffn,
                "vocab_size": VOCAB,
                "init_method_std": 0.7 / size.hidden**0.5,
            },
            "moe": dict(arm.moe),
            "data": {"seq_length": size.length},
            "training": {
                "global_batch_size": size.samples,
                "micro_batch_size": size.samples,
                "train_iters": size.steps,
                "seed": seed,
            },
            "optimizer": {
                "lr": size.lr,
                "min_lr": size.lr / 20,
                "lr_decay_style": "cosine",
                "lr_warmup_iters": max(1, size.steps // 20),
                "weight_decay": 0.0,
                "adam_beta2": 0.95,
            },
        }
    )


def code_version() -> str:
    """Of everything that can change a number: the package's sources."""
    root = Path(megatron_moe.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("convert", "report", "checkpoint", "inference"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def run(arm: Arm, size: Size, seed: int, text: Text) -> dict[str, Any]:
    """Train and measure; the values of one line of the ledger, without its key."""
    config = config_of(arm, size, seed)
    engine = Engine(config, ParallelState.alone(), torch.device("cpu"), VOCAB)
    deciding = _router_parameters(engine)
    first = {name: value.detach().clone() for name, value in deciding.items()}
    if arm.frozen:
        for parameter in deciding.values():
            parameter.register_hook(torch.zeros_like)
    valid = trial_batches(text.valid, samples=size.samples, length=size.length, batches=size.trials)
    unlike = trial_batches(text.unlike, samples=size.samples, length=size.length, batches=size.trials)
    curve, seconds = [], []
    every = max(1, size.steps // 8)
    result = None
    for step in range(size.steps):
        batch = training_batch(text, seed=seed, step=step, samples=size.samples, length=size.length)
        started = time.perf_counter()
        result = engine.train_step(step, [batch])
        seconds.append(time.perf_counter() - started)
        if (step + 1) % every == 0 or step + 1 == size.steps:
            curve.append((step + 1, _loss(engine, valid)))
    assert result is not None
    routing = summarise_routing(result.metrics.layers)
    return {
        "loss": curve[-1][1],
        "unlike": _loss(engine, unlike),
        "curve": curve,
        "bigram": text.bigram("valid"),
        "train_loss": result.metrics.loss,
        "max_violation": routing.max_violation if routing else None,
        "drop_rate": routing.drop_rate if routing else None,
        "unserved_rate": routing.unserved_rate if routing else None,
        "seconds_per_step": statistics.median(seconds),
        "rows_per_token": _travelling_rows(engine, valid[0]),
        "flops_per_token": _flops_per_token(engine, size, valid[0]) * engine.objective.num_passes,
        "parameters": sum(p.numel() for module in engine.modules for p in module.parameters()),
        "router_moved": _moved(first, deciding),
    }


def _flops_per_token(engine: Engine, size: Size, batch: Batch) -> float:
    """Of a training step: three times the matrix products of a forward pass, the router's among them."""
    with FlopCounterMode(display=False) as counter:
        engine.evaluate([batch])
    # scores and values of attention, half of them for it is causal, which the counter does not see
    attention = 2 * size.length * size.hidden * size.layers
    return 3.0 * (float(counter.get_total_flops()) / (size.samples * size.length) + attention)


def _loss(engine: Engine, batches: list[Batch]) -> float:
    """Nats per byte; windows are equally long, so the mean of their batches."""
    return statistics.fmean(engine.evaluate([batch])[0].loss for batch in batches)


def _router_parameters(engine: Engine) -> dict[str, nn.Parameter]:
    """Parameters of whoever decides, experts and tables left out."""
    found = {}
    for stage in engine.stages:
        for index, layer in stage.moe_layers().items():
            for name, parameter in deciding_part(layer).named_parameters():
                if not name.startswith("experts."):
                    found[f"{index}.{name}"] = parameter
    return found


def _moved(first: Mapping[str, Tensor], now: Mapping[str, nn.Parameter]) -> float | None:
    """How far the router's parameters are from where they began, relative to their first norm."""
    if not first:
        return None
    way = sum(float((now[name].detach() - value).square().sum()) for name, value in first.items())
    norm = sum(float(value.square().sum()) for value in first.values())
    return math.sqrt(way / max(norm, 1e-12))


class _Listener:
    """Stands before a layer's dispatcher and counts rows that would leave their rank."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.dispatch = layer.dispatcher.dispatch
        self.rows = self.tokens = 0.0

    def __call__(
        self, tokens: Tensor, plan: RoutingPlan, keys: Tensor | None = None, beside: Callable[[], None] = nothing
    ) -> Any:
        served = plan.expert_ids < plan.num_experts
        ranks = plan.expert_ids[served] * RANKS // plan.num_experts
        home = plan.token_ids[served] * RANKS // max(1, plan.num_tokens)
        pairs = plan.token_ids[served] * RANKS + ranks
        leaving = pairs[ranks != home]
        if self.layer.router.dispatcher == "one_per_rank":
            leaving = leaving.unique()
        self.rows += leaving.numel()
        self.tokens += plan.num_tokens
        return self.dispatch(tokens, plan, keys, beside)


def _travelling_rows(engine: Engine, batch: Batch) -> float | None:
    """Rows that a token sends to other ranks in a layer, were its experts and tokens spread over four ranks."""
    layers = [layer for stage in engine.stages for layer in stage.moe_layers().values() if isinstance(layer, MoELayer)]
    listeners = [_Listener(layer) for layer in layers]
    for listener in listeners:
        listener.layer.dispatcher.dispatch = listener  # type: ignore[method-assign]
    engine.evaluate([batch])
    for listener in listeners:
        listener.layer.dispatcher.dispatch = listener.dispatch  # type: ignore[method-assign]
    tokens = sum(listener.tokens for listener in listeners)
    return sum(listener.rows for listener in listeners) / tokens if tokens else None
