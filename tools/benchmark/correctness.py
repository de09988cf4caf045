"""Every operation of the MoE model on the device against an independent float64 computation on the CPU.

Errors are ||found - wanted|| / ||wanted||, each wanted value computed in float64 from the same, already rounded inputs.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from megatron_moe.layers.attention_core import AttentionCore, GatheredAttention, Sight
from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.loss import vocabulary_cross_entropy
from megatron_moe.layers.ring_attention import RingAttention
from megatron_moe.models.whole import plain_context
from megatron_moe.ops.activation import ACTIVATIONS
from megatron_moe.ops.grouped_gemm import grouped_linear, loop_product, native_product
from megatron_moe.ops.permute import combine, copies_of, permute
from megatron_moe.ops.rotary import rotary_angles, rotate
from megatron_moe.parallel.state import ParallelState
from tools.benchmark.model_correctness import check_model, check_training_step
from tools.benchmark.results import Recorder, recorder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# one rounding to bf16 is off by 2^-9 at most, 1.1e-3 on average; each check makes one to four of them
BF16 = 6e-3
# attention also rounds its probabilities and their gradients, and sums products of both over the sequence
ATTENTION_BF16 = 2e-2
# fp32 sums of some thousand terms are off by about 1e-6; tf32, which must not be used, by 3e-4
FP32 = 5e-5
WHY = {"fp32": "float32 throughout: below the 3e-4 that tf32 would show", "bf16": "a few roundings to bf16, 2^-9 each"}

Function = Callable[..., Tensor]


def tolerance(dtype: str, bf16: float = BF16) -> float:
    """What a check in that type may be off by."""
    return bf16 if dtype == "bf16" else FP32


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, taken in float64 on the CPU; NaN stays NaN."""
    wide = wanted.detach().double().cpu()
    return float((found.detach().double().cpu() - wide).norm() / wide.norm().clamp(min=1e-300))


def poison(device: torch.device) -> None:
    """Leave NaN in memory that the next allocations get, so that an element nobody writes is seen."""
    held = [torch.full((1 << size,), math.nan, device=device) for size in range(8, 22)]
    del held


def compare(
    name: str,
    function: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    dtype: str,
    record: Recorder,
    bf16: float = BF16,
) -> None:
    """Answer and gradients of function, on the device, against reference, in float64 on the CPU.

    inputs: float64 on the CPU; rounded to the dtype for both.
    """
    here = [tensor.to(DTYPES[dtype]).to(record.device).requires_grad_() for tensor in inputs]
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in here]
    poison(record.device)
    found, wanted = function(*here), reference(*wide)
    upward = torch.randn(wanted.shape, dtype=torch.float64).to(found.dtype)
    errors = [relative_error(found, wanted)]
    poison(record.device)
    found_gradients = torch.autograd.grad(found, here, upward.to(record.device))
    wanted_gradients = torch.autograd.grad(wanted, wide, upward.double())
    errors += [relative_error(mine, true) for mine, true in zip(found_gradients, wanted_gradients, strict=True)]
    worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
    record.check(f"{name} {dtype}: forward and gradients", worst, tolerance(dtype, bf16), WHY[dtype])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def uneven_counts(experts: int, mean: int) -> list[int]:
    """Rows of each expert: none, one, and few to many."""
    counts = [int(mean * (0.2 + 1.6 * (index * 7 % experts) / experts)) for index in range(experts)]
    return [0, 1, *counts[2:-1], 0]


def check_grouped(dtype: str, record: Recorder) -> None:
    """The grouped product: the loop, torch's kernel, and what the layer uses, with its gradients."""
    experts, mean, width, out_features = (4, 6, 16, 24) if record.quick else (16, 96, 128, 192)
    counts = uneven_counts(experts, mean)
    rows, weight = random(sum(counts), width), random(experts, out_features, width) / math.sqrt(width)
    owner = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)])

    def reference(rows: Tensor, weight: Tensor) -> Tensor:
        # every row meets every weight, and all answers but its own expert's are thrown away
        return (torch.einsum("ri,eoi->reo", rows, weight) * (owner[:, None] == torch.arange(experts))[..., None]).sum(1)

    here = [tensor.to(DTYPES[dtype]) for tensor in (rows, weight)]
    wanted = reference(*(tensor.double() for tensor in here))
    there = [tensor.to(record.device) for tensor in here]
    implementations = {"loop": loop_product, "native": native_product}
    for name, implementation in implementations.items():
        poison(record.device)
        found = implementation(there[0], there[1], counts)
        record.check(f"{name} product {dtype}", relative_error(found, wanted), tolerance(dtype), WHY[dtype])
        # as the backward pass calls it: the weight as a transposed view
        poison(record.device)
        back = implementation(found, there[1].transpose(1, 2), counts)
        true = reference(found.double().cpu(), here[1].double().mT)
        record.check(f"{name} product, transposed, {dtype}", relative_error(back, true), tolerance(dtype), WHY[dtype])

    def layer(rows: Tensor, weight: Tensor) -> Tensor:
        return grouped_linear(rows, weight, out_features, counts)

    compare("grouped linear", layer, reference, [rows, weight], dtype, record)


def check_permutation(dtype: str, record: Recorder) -> None:
    """Rows to their experts and home, weighted; some assignments belong to nobody."""
    tokens, choices, experts, width = (10, 2, 4, 8) if record.quick else (1000, 4, 16, 128)
    expert_ids = torch.randint(0, experts + 1, (tokens * choices,))
    order = expert_ids.argsort(stable=True)[: int((expert_ids < experts).sum())]
    token_ids = torch.arange(tokens).repeat_interleave(choices)
    there = [tensor.to(record.device) for tensor in (order, token_ids)]
    weights = torch.rand(tokens * choices, dtype=torch.float64)

    def function(hidden: Tensor, weights: Tensor) -> Tensor:
        copies = copies_of(there[1][there[0]], tokens)
        return combine(permute(hidden, copies), weights.float()[there[0]], copies)

    def reference(hidden: Tensor, weights: Tensor) -> Tensor:
        # what goes out comes back as it was: each token times the sum of its served weights
        return (weights * (expert_ids < experts)).view(tokens, choices).sum(dim=1)[:, None] * hidden

    compare("permute, combine", function, reference, [random(tokens, width), weights], dtype, record)


def check_rotary(dtype: str, record: Recorder) -> None:
    """The turn of each pair of dimensions, as a complex product."""
    length, heads, width = (7, 2, 8) if record.quick else (2048, 4, 64)
    positions = torch.arange(length)[:, None]
    turned = width // 2

    def function(query: Tensor) -> Tensor:
        return rotate(query, rotary_angles(positions.to(query.device), turned, 10000.0, query.dtype))

    def reference(query: Tensor) -> Tensor:
        half = turned // 2
        angle = positions[..., None].double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        pairs = torch.complex(query[..., :half], query[..., half:turned])
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, :, None]
        return torch.cat([pairs.real, pairs.imag, query[..., turned:]], dim=-1)

    compare("rotary", function, reference, [random(length, 1, heads, width)], dtype, record)


def check_activations(dtype: str, record: Recorder) -> None:
    """All activations from their definitions."""

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2.0)))

    def by_tanh(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    references: dict[str, Function] = {
        "swiglu": lambda inner: inner[:, 0] / (1 + torch.exp(-inner[:, 0])) * inner[:, 1],
        "geglu": lambda inner: gelu(inner[:, 0]) * inner[:, 1],
        "geglu_tanh": lambda inner: by_tanh(inner[:, 0]) * inner[:, 1],
        "gelu": lambda inner: gelu(inner[:, 0]),
        "relu": lambda inner: inner[:, 0].clamp(min=0.0),
    }
    rows, width = (5, 8) if record.quick else (512, 256)
    for name, (branches, function) in ACTIVATIONS.items():
        compare(name, function, references[name], [random(rows, branches, width)], dtype, record)


def check_cross_entropy(dtype: str, record: Recorder) -> None:
    """The loss of each token over a padded vocabulary."""
    tokens, vocab, padded = (6, 11, 16) if record.quick else (512, 30001, 30080)
    labels = torch.randint(0, vocab, (tokens,))
    tp = ParallelState.alone().tp

    def function(logits: Tensor) -> Tensor:
        return vocabulary_cross_entropy(logits, labels.to(logits.device), vocab, tp)

    def reference(logits: Tensor) -> Tensor:
        return logits[:, :vocab].logsumexp(dim=1) - logits[torch.arange(tokens), labels]

    compare("vocabulary cross-entropy", function, reference, [3 * random(tokens, padded)], dtype, record)


def _attend(core: AttentionCore, sight: Sight, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return core(query, key, value, sight)


def check_attention(dtype: str, record: Recorder) -> None:
    """The attention cores, causal, grouped queries, in one document and in two, against the textbook formula.

    The ring has one rank here: its tiles are what is checked.
    """
    length, samples, groups, per_group, width = (6, 2, 2, 2, 8) if record.quick else (384, 2, 2, 4, 64)
    plain = plain_context(torch.zeros(samples, length, dtype=torch.int64, device=record.device))
    segments = torch.zeros(length, samples, dtype=torch.int32, device=record.device)
    segments[length // 3 :, 0] = 1
    segments[length - 2 :, 1] = -1
    view = plain.view
    packed_view = type(view)(
        view.tokens, view.positions, segments, view.sample_ids, view.rows, segmented=True, start=view.start
    )
    packed = ForwardContext(packed_view, plain.random, train=False, sequence_parallel=False)
    alone = ParallelState.alone().cp
    ring = RingAttention(alone, most_scores=1, fewest_keys=100)
    cores: dict[str, AttentionCore] = {"attention": GatheredAttention(alone), "ring attention": ring}
    for name, (pattern, ctx) in product(cores, (("causal", plain), ("packed", packed))):
        document = ctx.view.segments.cpu().t()
        before = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = (before & (document[:, :, None] == document[:, None, :]))[:, None, None]

        sight = Sight(ctx.view, ctx.view, causal=True)
        function = partial(_attend, cores[name], sight)

        def reference(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor = allowed) -> Tensor:
            scores = torch.einsum("sbgqd,tbgd->bgqst", query, key) / math.sqrt(width)
            weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
            return torch.einsum("bgqst,tbgd->sbgqd", weights, value)

        shape = (length, samples, groups)
        inputs = [random(*shape, per_group, width), random(*shape, width), random(*shape, width)]
        compare(f"{name}, {pattern}", function, reference, inputs, dtype, record, ATTENTION_BF16)


CHECKS: tuple[Callable[[str, Recorder], None], ...] = (
    check_grouped,
    check_permutation,
    check_rotary,
    check_activations,
    check_cross_entropy,
    check_attention,
    check_model,
    check_training_step,
)


def run(record: Recorder) -> None:
    """All checks in both types. A check that cannot run counts as failed, and the others still run."""
    for check in CHECKS:
        for dtype in DTYPES:
            if record.seconds_left < 0:
                record.skip(f"{check.__name__} {dtype}", "no time left")
                continue
            try:
                check(dtype, record)
            except Exception as error:
                record.broke(f"{check.__name__} {dtype}", error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this part."""
    record = recorder("correctness", argv, __doc__)
    torch.manual_seed(0)
    if record.device.type == "cpu":
        torch.set_num_threads(1)
    run(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
