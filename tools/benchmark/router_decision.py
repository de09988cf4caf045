"""What deciding costs: scores to sorted plan, as a share of the whole layer, for every router.

4,096 tokens, 16 experts, and each expert as wide as makes a token's work that of one dense layer of inner width 4 H.
Measured in the same rounds as the layer itself, forward only on the CPU and forward + backward on a GPU. Joint
decisions are measured with 64 experts too, and where they are hardest: all tokens alike, and all want one expert.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.layers.context import ForwardContext
from megatron_moe.models.build import gpt_spec
from megatron_moe.models.transformer import build_moe
from megatron_moe.models.whole import plain_context
from megatron_moe.moe.dispatch.local import by_expert
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.routers.registry import ROUTERS
from megatron_moe.moe.token_info import token_info
from megatron_moe.parallel.state import ParallelState
from megatron_moe.report.router_list import example_config
from tools.benchmark.results import Recorder, recorder
from tools.benchmark.timing import Clock, clock_for, measure

# a joint decision over all tokens of a group; held below one layer's time
EXEMPT = ("base", "sinkhorn", "ec_cap")
HARD = ("random", "alike", "one expert")
SHARE = {"cpu": 0.01, "cuda": 0.10}


@dataclass(frozen=True)
class Case:
    """Tokens in so many samples, hidden size, experts."""

    tokens: int
    samples: int
    hidden: int
    experts: int
    scores: str = "random"  # "alike": all tokens nearly the same; "one expert": preferred by all


def build_layer(name: str, case: Case, device: torch.device) -> MoELayer:
    """The layer as the model builds it, with random weights."""
    example = example_config(name)
    if name == "switch":
        # jitter is drawn before there are scores: it costs what it costs, but decides nothing
        example = replace(example, router_options={"jitter_eps": "0"})
    choices = ROUTERS[name].choices(example)
    moe = replace(example, num_experts=case.experts, layer_freq="1", ffn_hidden_size=4 * case.hidden // max(1, choices))
    config = RunConfig.from_dict(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": case.hidden,
                "num_attention_heads": 1,
                "ffn_hidden_size": 4 * case.hidden,
                "vocab_size": 64,
            },
            "data": {"seq_length": case.tokens // case.samples},
            "training": {"global_batch_size": 1, "train_iters": 1},
            "precision": {"dtype": "bf16" if device.type == "cuda" else "fp32"},
            "optimizer": {"lr": 0.1},
        }
    )
    spec = replace(gpt_spec(config, 64).layers[0], moe=moe)
    layer = build_moe(spec, moe, ParallelState.alone())
    for module in layer.modules():
        for key, parameter in module.named_parameters(recurse=False):
            real = torch.nn.Parameter(torch.randn(parameter.shape, dtype=parameter.dtype, device=device) * 0.02)
            module.register_parameter(key, real)
    return layer.to(device)


def decision(layer: MoELayer, ctx: ForwardContext, backward: bool) -> Callable[[Tensor], object]:
    """Scores, plan, limit and order by expert; and back through the weights."""

    # what scores are made of (Avg-K's means of weights) comes before there are any
    keys = layer.experts.mean_keys().detach().to(layer.router.dtype) if layer.router.reads_expert_keys else None

    def decide(hidden: Tensor) -> object:
        tokens = hidden.flatten(0, 1)
        info = replace(token_info(ctx, layer.tp, layer.index, layer.group_samples), expert_keys=keys)
        plan = layer.limit(layer.router(tokens, info), info)
        order = by_expert(plan)
        if backward and plan.combine_weights.requires_grad:
            plan.combine_weights.sum().backward()
        return order

    return decide


def whole(layer: MoELayer, ctx: ForwardContext, backward: bool) -> Callable[[Tensor], object]:
    """The layer as a step runs it."""

    def run(hidden: Tensor) -> object:
        out = layer(hidden, ctx).hidden
        if backward:
            out.sum().backward()
        return out

    return run


def _tokens(layer: MoELayer, case: Case, ids: Tensor) -> Tensor:
    """(S, B, H) whose scores are as the case wants them."""
    hidden = torch.randn(*ids.t().shape, case.hidden, device=ids.device)
    if case.scores == "alike":
        hidden = hidden[:1, :1] + 1e-4 * hidden
    if case.scores == "one expert":
        favourite: Tensor = layer.router.get_parameter("weight")[0].detach().float()
        hidden = hidden + 50.0 * favourite / favourite.square().sum().sqrt()
    return hidden


def _once(call: Callable[[Tensor], object], hidden: Tensor, turn: int) -> object:
    return call(hidden)


def run_router(name: str, case: Case, clock: Clock, record: Recorder) -> None:
    """One router: both times, and their ratio held to its bound."""
    device = record.device
    layer = build_layer(name, case, device)
    group = layer.group_samples
    ids = torch.randint(64, (max(case.samples, group), case.tokens // case.samples), device=device)
    ctx = replace(plain_context(ids), train=True)
    backward = device.type == "cuda"
    shape: dict[str, Any] = {"router": name, "T": ids.numel(), "d": case.hidden, "E": case.experts}
    if case.scores != "random":
        shape["scores"] = case.scores
    hidden = _tokens(layer, case, ids).to(layer.experts.w1.dtype).requires_grad_(backward)
    calls = {"decision": decision(layer, ctx, backward), "layer": whole(layer, ctx, backward)}
    with torch.set_grad_enabled(backward):
        variants = {key: partial(_once, call, hidden) for key, call in calls.items()}
        found = measure(variants, clock, seconds=0.2 if record.quick else 4.0, most=20)
    for key, timing in found.items():
        record.timed(key, timing, shape)
    deciding, layer_time = found["decision"].median, found["layer"].median
    share = deciding / layer_time
    record.figure("decision", 100 * share, "% of the layer", shape, headline=True)
    if name in EXEMPT:
        # beside the layer without it: within the layer it could never be more than all
        share = deciding / max(layer_time - deciding, 1e-9)
    bound = 1.0 if name in EXEMPT else SHARE[device.type]
    if not record.quick:
        where = "" if name not in EXEMPT else f", {case.experts} experts, {case.scores} scores"
        record.check(f"{name}{where}: deciding costs at most {bound:.0%} of the layer", share, bound, "one run")


def main(arguments: Sequence[str] | None = None) -> int:
    """All routers, as far as time allows."""
    record = recorder("router_decision", arguments, __doc__)
    clock = clock_for(record.device)
    torch.manual_seed(0)
    case = Case(64, 2, 32, 16) if record.quick else Case(4096, 4, 1024, 16)
    for name, router in ROUTERS.items():
        if getattr(router, "wraps_block", False):
            record.skip(name, "its expert is a whole block")
        else:
            _try(name, case, clock, record)
    hard = [] if record.quick else [(experts, scores) for experts in (16, 64) for scores in HARD]
    for name in EXEMPT:
        for experts, scores in hard[1:]:
            _try(name, replace(case, experts=experts, scores=scores), clock, record)
    return 0


def _try(name: str, case: Case, clock: Clock, record: Recorder) -> None:
    if record.seconds_left < 0:
        record.skip(name, "no time left")
        return
    try:
        run_router(name, case, clock, record)
    except Exception as error:  # the other routers still count
        record.broke(f"{name} runs", error)


if __name__ == "__main__":
    sys.exit(main())
