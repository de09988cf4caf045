"""The MoE layer, forward and backward, against transformers' blocks and a dense feed-forward layer of the same FLOPs.

FLOPs: 18 T k d f (three products forward, six backward); router, permutation and combination count in time only.
R_peak: FLOP/s over the rate of a large product of the same dtype, timed in the same rounds.  R_dense: time of a dense
SwiGLU layer on T k rows over the time of the MoE layer; 1 = routing is free.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.optional import require
from megatron_moe.config.run import RunConfig
from megatron_moe.layers.weight_gradients import Immediate
from megatron_moe.models.build import gpt_spec
from megatron_moe.models.transformer import build_moe
from megatron_moe.models.whole import plain_context
from megatron_moe.moe.layer import MoELayer
from megatron_moe.parallel.state import ParallelState
from tools.benchmark.ceilings import product_size, square_product
from tools.benchmark.results import Recorder, recorder
from tools.benchmark.timing import Clock, Timing, Variant, clock_for, measure, peak_bytes, saved_bytes, top_operations

INPUT_SETS = 3
PEER_TOLERANCE = {
    # both round after each of three products (2^-9 at most) and add k answers in another order
    "bf16": 2e-2,
    # sums of up to 14336 terms in another order
    "fp32": 1e-4,
}


@dataclass(frozen=True)
class Case:
    """One published shape. T tokens, d hidden, f inner width of an expert, E experts, k choices of a token."""

    name: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    choices: int
    samples: int
    block: str  # transformers' module of that model

    def shape(self, dtype: str, load: str) -> dict[str, Any]:
        """What a figure is labelled with."""
        sizes = {"T": self.tokens, "d": self.hidden, "f": self.ffn, "E": self.experts, "k": self.choices}
        return {"model": self.name, **sizes, "dtype": dtype, "load": load}

    @property
    def flops(self) -> float:
        return 18.0 * self.tokens * self.choices * self.hidden * self.ffn


CUDA_CASES = (
    Case("Mixtral-8x7B", 16384, 4096, 14336, 8, 2, 4, "mixtral"),
    Case("OLMoE-1B-7B", 32768, 2048, 1024, 64, 8, 8, "qwen3_moe"),
    Case("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8, 8, "qwen3_moe"),
)
CPU_CASES = (
    Case("E8", 1024, 512, 1792, 8, 2, 1, "mixtral"),
    Case("E64", 1024, 512, 256, 64, 8, 1, "qwen3_moe"),
)
QUICK_CASES = (
    Case("tiny-E4", 64, 32, 48, 4, 2, 2, "mixtral"),
    Case("tiny-E8", 64, 32, 16, 8, 4, 2, "qwen3_moe"),
)


def build_layer(case: Case, dtype: str, device: torch.device) -> MoELayer:
    """The layer as the model builds it; its router reads logits off the first E features of a token."""
    config = RunConfig.from_dict(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": case.hidden,
                "num_attention_heads": 1,
                "ffn_hidden_size": case.ffn,
                "vocab_size": 8,
            },
            "moe": {"num_experts": case.experts, "router_topk": case.choices},
            "data": {"seq_length": case.tokens // case.samples},
            "training": {"global_batch_size": 1, "train_iters": 1},
            "precision": {"dtype": dtype},
            "optimizer": {"lr": 0.1},
        }
    )
    spec = gpt_spec(config, 8)
    layer = build_moe(spec.layers[0], config.moe, ParallelState.alone()).to_empty(device=device)
    with torch.no_grad():
        layer.experts.w1.normal_(std=case.hidden**-0.5)
        layer.experts.w2.normal_(std=case.ffn**-0.5)
        layer.router.get_parameter("weight").copy_(torch.eye(case.experts, case.hidden))
    return layer


def make_tokens(case: Case, load: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, d): the first E features are logits for which expert e is drawn with p_e, without replacement.

    load: "uniform", or "zipf": p_e proportional to 1 / (e + 1).  A largest-k of log p + Gumbel noise is such a draw.
    """
    tokens = torch.randn(case.tokens, case.hidden, device=device)
    noise = -torch.empty(case.tokens, case.experts, device=device).exponential_().log()
    if load == "zipf":
        noise -= torch.arange(1, case.experts + 1, device=device).log()
    tokens[:, : case.experts] = noise
    return tokens.to(dtype)


def ours(layer: MoELayer, case: Case) -> Callable[[Tensor], Tensor]:
    """The layer as a function of tokens (T, d), gradients by autograd as in the peers."""
    device = layer.experts.w1.device
    ids = torch.zeros(case.samples, case.tokens // case.samples, dtype=torch.int64, device=device)
    ctx = replace(plain_context(ids), train=True)
    return lambda tokens: layer(tokens.view(-1, case.samples, case.hidden), ctx).hidden.view(tokens.shape)


def ours_in_training(layer: MoELayer, case: Case) -> Callable[[Tensor], Tensor]:
    """The same, with weight gradients added to wide totals as the training step does."""
    device = layer.experts.w1.device
    for weight in (layer.experts.w1, layer.experts.w2):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    ids = torch.zeros(case.samples, case.tokens // case.samples, dtype=torch.int64, device=device)
    ctx = replace(plain_context(ids), train=True, weight_gradients=Immediate())
    return lambda tokens: layer(tokens.view(-1, case.samples, case.hidden), ctx).hidden.view(tokens.shape)


def transformers_block(layer: MoELayer, case: Case, dtype: torch.dtype) -> Any:
    """transformers' block of that model on the same weights. Raises ConfigError without the library."""
    common = {"hidden_size": case.hidden, "num_experts_per_tok": case.choices}
    if case.block == "mixtral":
        library = require("transformers.models.mixtral.modeling_mixtral", extra="hf")
        config = library.MixtralConfig(intermediate_size=case.ffn, num_local_experts=case.experts, **common)
        make = library.MixtralSparseMoeBlock
    else:
        library = require("transformers.models.qwen3_moe.modeling_qwen3_moe", extra="hf")
        more = {"moe_intermediate_size": case.ffn, "num_experts": case.experts, "norm_topk_prob": True}
        config = library.Qwen3MoeConfig(**more, **common)
        make = library.Qwen3MoeSparseMoeBlock
    with torch.device("meta"):
        block = make(config)
    w1, w2 = layer.experts.w1, layer.experts.w2
    block.experts.gate_up_proj = nn.Parameter(w1.detach().flatten(1, 2))
    block.experts.down_proj = nn.Parameter(w2.detach())
    block.gate.weight = nn.Parameter(layer.router.get_parameter("weight").detach().to(dtype))
    return block


def peer(block: Any, implementation: str) -> Callable[[Tensor], Tensor]:
    """transformers' block with its experts computed in that way."""

    def call(tokens: Tensor) -> Tensor:
        block.experts.config._experts_implementation = implementation
        out: Tensor = block(tokens[None])[0]
        return out

    return call


def swiglu(inner: Tensor) -> Tensor:
    """(R, 2 f) -> (R, f)."""
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def dense(w1: Tensor, w2: Tensor, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A dense SwiGLU layer with one expert's weights, for T k rows."""
    return lambda rows: F.linear(activation(F.linear(rows, w1)), w2)


def forward_backward(
    function: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Variant:
    """Forward, then the gradients of the input and of every weight, on the input set of the round."""

    def call(turn: int) -> object:
        rows = inputs[turn % len(inputs)]
        out = function(rows)
        return torch.autograd.grad(out, [rows, *weights], gradients[turn % len(gradients)], allow_unused=True)

    return call


@dataclass(frozen=True)
class Peers:
    """Everything that one case compares: for each name a function, its weights, and whether it takes T k rows."""

    functions: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor], bool]]
    layer: MoELayer

    def named(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor], list[Tensor], bool]]:
        for name, (function, weights, is_dense) in self.functions.items():
            yield name, function, weights, is_dense


def build_peers(case: Case, dtype: str, record: Recorder) -> Peers:
    """All that can run here; what cannot is recorded as skipped."""
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    layer = build_layer(case, dtype, record.device)
    weights: list[Tensor] = list(layer.parameters())
    w1 = nn.Parameter(layer.experts.w1.detach()[0].flatten(0, 1).clone())
    w2 = nn.Parameter(layer.experts.w2.detach()[0].clone())
    functions: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor], bool]] = {
        "ours": (ours(layer, case), weights, False),
        "ours, wide gradients in place": (ours_in_training(layer, case), weights, False),
        "dense": (dense(w1, w2, swiglu), [w1, w2], True),
    }
    if record.device.type == "cuda" and not record.quick:
        functions["dense, compiled SwiGLU"] = (dense(w1, w2, torch.compile(swiglu, dynamic=False)), [w1, w2], True)
    try:
        block = transformers_block(layer, case, kind)
    except (ConfigError, AttributeError, TypeError) as error:
        record.skip(f"{case.name}: transformers' block", str(error))
    else:
        for implementation in ("grouped_mm", "eager"):
            functions[f"transformers {implementation}"] = (peer(block, implementation), list(block.parameters()), False)
    return Peers(functions, layer)


def keep_what_runs(peers: Peers, case: Case, tokens: Tensor, rows: Tensor, record: Recorder) -> Peers:
    """Leaves out peers that fail here (an optional kernel, a compiler), saying so; a failure of ours is raised."""
    kept = {}
    for name, function, weights, is_dense in peers.named():
        try:
            forward_backward(function, weights, [rows if is_dense else tokens], [rows if is_dense else tokens])(0)
        except Exception as error:
            if name.startswith("ours"):
                raise
            record.skip(f"{case.name}: {name}", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        else:
            kept[name] = (function, weights, is_dense)
    return replace(peers, functions=kept)


def check_agreement(peers: Peers, case: Case, tokens: Tensor, shape: dict[str, Any], record: Recorder) -> None:
    """Ours against transformers on the same weights: answers and the gradient of the tokens.

    Tokens whose k-th and next logits are equal are left out: either choice is right.
    """
    best = tokens.detach()[:, : case.experts].float().topk(min(case.choices + 1, case.experts), dim=1).values
    clear = (
        best[:, case.choices - 1] > best[:, case.choices] if best.shape[1] > case.choices else best[:, 0] == best[:, 0]
    )
    upward = torch.randn_like(tokens)

    def both(name: str) -> tuple[Tensor, Tensor]:
        out = peers.functions[name][0](tokens)
        (gradient,) = torch.autograd.grad(out, tokens, upward)
        return out.detach()[clear].float(), gradient[clear].float()

    if "transformers grouped_mm" in peers.functions:
        for what, mine, theirs in zip(
            ("answers", "gradient"), both("ours"), both("transformers grouped_mm"), strict=True
        ):
            error = float((mine - theirs).norm() / theirs.norm())
            name = f"{case.name} {shape['load']} {shape['dtype']}: {what} equal transformers'"
            why = "the same weights; sums in another order, and rounding to the dtype after each product"
            record.check(name, error, PEER_TOLERANCE[shape["dtype"]], why)


def report(case: Case, shape: dict[str, Any], timings: dict[str, Timing], ceiling: float, record: Recorder) -> None:
    """Milliseconds, TFLOP/s and the ratios. ceiling: FLOP/s of the large product in the same rounds."""
    for name, timing in timings.items():
        record.timed(f"{name}: forward + backward", timing, shape)
        record.figure(f"{name}: rate", case.flops / timing.median / 1e12, "TFLOP/s", shape, flops="18 T k d f")
    mine = timings["ours"].median
    record.figure("R_peak", case.flops / mine / ceiling, "of the large product", shape, headline=True)
    for name, timing in timings.items():
        if not name.startswith("ours"):
            label = name.replace("dense", "R_dense", 1) if name.startswith("dense") else f"speed over {name}"
            record.figure(label, timing.median / mine, "x", shape, headline=True)
    wide = timings["ours, wide gradients in place"].median
    record.figure("R_dense, wide gradients in place", timings["dense"].median / wide, "x", shape, headline=True)


def report_memory(peers: Peers, tokens: Tensor, rows: Tensor, shape: dict[str, Any], record: Recorder) -> None:
    """What is kept for the backward pass, and the high-water mark of forward + backward above the weights."""
    for name, function, weights, is_dense in peers.named():
        if "compiled" in name:  # hooks on saved tensors would compile it anew
            continue
        given = rows if is_dense else tokens
        kept = saved_bytes(lambda function=function, given=given: function(given), weights)  # type: ignore[misc]
        how = "bytes of the storages that autograd saves, weights left out"
        headline = name in ("ours", "transformers grouped_mm", "dense")
        record.figure(f"{name}: kept for backward", kept / 2**20, "MiB", shape, method=how, headline=headline)
        call = forward_backward(function, weights, [given], [given.detach()])
        peak = peak_bytes(lambda call=call: call(0), record.device)  # type: ignore[misc]
        if peak is not None:
            how = "max_memory_allocated of forward + backward above what was there before"
            record.figure(f"{name}: peak", peak / 2**20, "MiB", shape, method=how, headline=headline)


def report_profile(peers: Peers, tokens: Tensor, shape: dict[str, Any], record: Recorder) -> None:
    """Where our time goes."""
    function, weights, _ = peers.functions["ours"]
    call = forward_backward(function, weights, [tokens], [tokens.detach()])
    try:
        found = top_operations(lambda: call(0), record.device)
    except RuntimeError as error:  # no profiler on this machine
        record.skip(f"{shape['model']}: profile", str(error)[:200])
        return
    for name, share, calls in found:
        record.figure(
            f"ours: share of {name[:80]}", 100 * share, "%", shape, calls=calls, method="torch.profiler, own time"
        )


def run_case(case: Case, dtype: str, clock: Clock, record: Recorder) -> None:
    """One shape under both loads."""
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    device = record.device
    peers = build_peers(case, dtype, record)
    many = [torch.randn(case.tokens * case.choices, case.hidden, device=device).to(kind) for _ in range(INPUT_SETS)]
    rows = [tensor.requires_grad_() for tensor in many]
    upward = [torch.randn_like(rows[0]) for _ in range(INPUT_SETS)]
    size = product_size(device, record.quick)
    for load in ("uniform", "zipf"):
        shape = case.shape(dtype, load)
        if record.seconds_left < 0:
            record.skip(f"{case.name} {load}", "no time left")
            continue
        tokens = [make_tokens(case, load, kind, device).requires_grad_() for _ in range(INPUT_SETS)]
        peers = keep_what_runs(peers, case, tokens[0], rows[0], record)
        check_agreement(peers, case, tokens[0], shape, record)
        chosen = tokens[0].detach()[:, : case.experts].topk(case.choices).indices
        counts = chosen.flatten().bincount(minlength=case.experts)
        record.figure("heaviest expert", float(counts.max() / counts.float().mean()), "x the mean", shape)
        variants: dict[str, Variant] = {"ceiling": square_product(size, kind, device)}
        for name, function, weights, is_dense in peers.named():
            given, back = (rows, upward) if is_dense else (tokens, [part[: case.tokens] for part in upward])
            variants[name] = forward_backward(function, weights, given, back)
        budget = 0.1 if record.quick else 12.0 if device.type == "cuda" else 25.0
        timings = measure(variants, clock, seconds=min(budget, max(0.0, record.seconds_left)), most=30)
        ceiling = 2.0 * size**3 / timings.pop("ceiling").median
        report(case, shape, timings, ceiling, record)
        if load == "uniform":
            report_memory(peers, tokens[0], rows[0], shape, record)
            report_profile(peers, tokens[0], shape, record)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this part."""
    record = recorder("moe_layer", argv, __doc__)
    torch.manual_seed(0)
    clock = clock_for(record.device)
    on_cuda = record.device.type == "cuda"
    cases = QUICK_CASES if record.quick else CUDA_CASES if on_cuda else CPU_CASES
    for case in cases:
        try:
            run_case(case, "bf16" if on_cuda else "fp32", clock, record)
        except Exception as error:  # out of memory, say: the other shapes still count
            record.broke(f"{case.name} runs", error)
        if on_cuda:
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
