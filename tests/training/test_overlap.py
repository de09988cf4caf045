"""What travels is hidden behind what is computed, and nothing is read before it has arrived.

Computing and travelling are played by a clock of their own, so that neither cores nor noise matter: each attention
layer and each expert layer takes its time forward, again backward, and once more for the gradient of its weights; each
collective arrives so long after its start. One test does the same with real time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from delayed import Clock, Delayed, OwnTime
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.autograd import Function

from megatron_moe.certify.tiny_model import VOCAB, samples, tiny_config
from megatron_moe.config.run import RunConfig
from megatron_moe.layers.weight_gradients import WeightGradients
from megatron_moe.optim.bucket import layer_of
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine, grid_of

CPU = torch.device("cpu")
DELAY = 1.0  # of each collective


class Work:
    """A piece of computing, twice as long as a delay. Of a clock that runs by itself the unit is short."""

    def __init__(self, clock: Clock, unit: float) -> None:
        self.clock = clock
        self.unit = unit

    def do(self) -> None:
        self.clock.sleep(2.0 * DELAY * self.unit)


class _Working(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, work: Work, sink: WeightGradients | None, weight: Tensor) -> Tensor:
        ctx.work, ctx.sink, ctx.weight = work, sink, weight
        work.do()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.work.do()
        if ctx.sink is not None:
            ctx.sink.add(ctx.weight, lambda total: ctx.work.do())
        return grad, None, None, None


def make_slow(
    module: nn.Module, work: Work, sink_of: Callable[[Sequence[Any]], WeightGradients | None], weight: str
) -> None:
    """Let a module's forward pass, its backward pass and its weight gradients take time."""

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        sink = sink_of(arguments)
        return (_Working.apply(arguments[0], work, sink, module.get_parameter(weight)), *arguments[1:])

    module.register_forward_pre_hook(before)


class SlowRun:
    """An engine whose computing takes time, and whose collectives along some axes do."""

    def __init__(
        self, config: RunConfig, state: ParallelState, axes: Sequence[str], delay: float, unit: float | None
    ) -> None:
        """unit: seconds of the real clock that a delay of 1 takes; None: a clock of its own."""
        self.clock: Clock = OwnTime() if unit is None else time
        work = Work(self.clock, unit or 1.0)
        delay = delay * (unit or 1.0)
        wanted = [state.axis(name) for name in axes if state.axis(name).size > 1]
        self.late = {axis.name: Delayed(axis.comm, delay, self.clock) for axis in wanted}
        state = replace(state, **{axis.name: replace(axis, comm=self.late[axis.name]) for axis in wanted})
        self.engine = Engine(config, state, CPU, VOCAB)
        for stage in self.engine.stages:
            for layer in stage.layers.children():
                make_slow(layer.attention, work, lambda arguments: arguments[1].weight_gradients, "qkv")
                if layer.sparse is not None:
                    make_slow(layer.mlp.experts, work, lambda arguments: arguments[2], "w1")
                    if layer.mlp.shared_expert is not None:
                        make_slow(layer.mlp.shared_expert, work, lambda arguments: None, "w1")

    def second_step(self, microbatches: int) -> tuple[float, int]:
        """How long it takes, from the first update to the second, and how many collectives were late in it."""
        rank = self.engine.state.dp.rank
        batches = [samples([rank * microbatches + number]) for number in range(microbatches)]
        self.engine.train_step(0, batches)
        started, calls = self.clock.monotonic(), sum(comm.delayed for comm in self.late.values())
        self.engine.train_step(1, batches)
        return self.clock.monotonic() - started, sum(comm.delayed for comm in self.late.values()) - calls


def steps(
    rank: int,
    world_size: int,
    tables: Sequence[dict[str, Any]],
    axes: Sequence[str],
    microbatches: int,
    unit: float | None,
) -> tuple[float, float, int]:
    """A step without and with delays, and how many of them there were."""
    moe, model, parallel = tables
    config = tiny_config(moe, parallel, model)
    state = ParallelState.distributed(grid_of(config, world_size))
    quick, _ = SlowRun(config, state, axes, 0.0, unit).second_step(microbatches)
    slow, calls = SlowRun(config, state, axes, DELAY, unit).second_step(microbatches)
    return quick, slow, calls


def share_seen(
    moe: dict[str, Any],
    model: dict[str, Any],
    parallel: dict[str, Any],
    axes: Sequence[str],
    microbatches: int,
    unit: float | None = None,
) -> float:
    """How much of all delays of a step on four ranks its time shows."""
    found = run_on_ranks(4, steps, (moe, model, parallel), axes, microbatches, unit)
    assert unit is not None or len(set(found)) == 1
    quick, slow = (max(times) for times in list(zip(*found, strict=True))[:2])
    calls = found[0][2]
    assert calls > 10
    return (slow - quick) / (calls * DELAY * (unit or 1.0))


EP = {"expert_model_parallel_size": 4}
SPARSE: dict[str, Any] = {"layer_freq": "1"}
SHORT = {"num_layers": 2}
HIDDEN, SEEN = 0.2, 0.95  # most that may be seen of what is hidden, least of what is not


def test_all_to_alls_hide_behind_another_microbatch() -> None:
    assert share_seen(SPARSE, SHORT, {**EP, "pipeline_schedule": "1f1b_overlap"}, ["ep"], 8) < HIDDEN
    assert share_seen(SPARSE, SHORT, EP, ["ep"], 8) > SEEN


def test_so_they_do_in_real_time() -> None:
    """A machine that does other things too gets several tries: they only ever add."""
    overlap = {**EP, "pipeline_schedule": "1f1b_overlap"}
    shares = []
    for _ in range(5):
        shares.append(share_seen(SPARSE, SHORT, overlap, ["ep"], 8, unit=0.015))
        if shares[-1] < HIDDEN:
            break
    assert min(shares) < HIDDEN, shares


def test_data_parallel_collectives_hide_behind_computing() -> None:
    axes, moe = ["dp", "dp_cp", "edp"], {**SPARSE, "ffn_hidden_size": 8}
    model = {"num_layers": 6, "untie_embeddings_and_output_weights": True}
    buckets = {"ddp_bucket_size": 1}
    assert share_seen(moe, model, buckets, axes, 2) < HIDDEN
    late = {**buckets, "overlap_grad_reduce": False, "overlap_param_gather": False}
    assert share_seen(moe, model, late, axes, 2) > SEEN / 2  # all gathers travel at once, and are half of it


def test_a_shared_expert_hides_the_way_to_the_others() -> None:
    """While the rows travel there, and while their gradients travel back: two of five exchanges."""
    moe = {**SPARSE, "shared_expert_intermediate_size": 8}
    beside = share_seen(moe, SHORT, EP, ["ep"], 2)
    assert share_seen({**moe, "shared_expert_overlap": False}, SHORT, EP, ["ep"], 2) - beside > 0.39


def gradients_when_told(rank: int, world_size: int, moe: dict[str, Any], parallel: dict[str, Any]) -> int:
    """Layers that were said to be done; their gradients must not change any more."""
    config = tiny_config(moe, parallel, {})
    engine = Engine(config, ParallelState.distributed(grid_of(config, world_size)), CPU, VOCAB)
    named = {name: parameter for stage in engine.stages for name, parameter in stage.named_parameters()}
    told: list[tuple[int, dict[str, Tensor]]] = []

    def note(stage: int, layer: int) -> None:
        done = {name: w.main_grad.clone() for name, w in named.items() if (layer_of(name) or -1) >= layer}
        told.append((layer, done))

    engine.buckets.layer_done = note  # type: ignore[method-assign]
    final: dict[str, Tensor] = {}
    right = engine.buckets.reduce

    def reduce(stage: int | None = None) -> None:
        if stage is not None:
            final.update({name: w.main_grad.clone() for name, w in named.items()})
        right(stage)

    engine.buckets.reduce = reduce  # type: ignore[method-assign]
    engine.train_step(0, [samples([4 * rank + number]) for number in range(4)])
    for _, done in told:
        for name, gradient in done.items():
            assert torch.equal(gradient, final[name]), name
    assert [layer for layer, _ in told] == sorted({layer for layer, _ in told}, reverse=True)
    return len(told)


AUX = {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.1}
EP2 = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("moe", "parallel", "layers"),
    [
        ({**AUX, "shared_expert_intermediate_size": 8, "shared_expert_gate": True}, {}, 4),
        (AUX, {**EP2, "pipeline_schedule": "1f1b_overlap"}, 4),
        (AUX, {**EP2, "recompute_granularity": "full", "recompute_num_layers": 2}, 4),
        (AUX, {**EP2, "recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]}, 4),
        (AUX, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "1f1b_split"}, 2),
        ({"router_type": "avg_k", "router_options": {"gate_weight": "softmax", "key_source": "live"}}, EP2, 4),
        ({"router_type": "thor", "consistency_coeff": 5.0}, {}, 4),
    ],
)
def test_a_layer_is_said_to_be_done_when_its_gradients_are_whole(
    moe: dict[str, Any], parallel: dict[str, Any], layers: int
) -> None:
    assert run_on_ranks(2, gradients_when_told, moe, parallel) == [layers, layers]
