"""Three promises of a way of routing, measured on a small model instead of believed.

decoder-safe: no later token of a sequence changes what the model says at an earlier place, in training or evaluation.
batch-invariant: no other sequence of the batch changes it.
generation-safe: decoding token by token gives what one pass over the whole sequence gives.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.inference.generate import decoding_view
from megatron_moe.inference.kv_cache import ReservedCache
from megatron_moe.layers.context import ForwardContext
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.gpt import GPTStage
from megatron_moe.models.whole import plain_context
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState

VOCAB, LENGTH, SAMPLES, SEEDS, TRIALS = 53, 12, 4, 3, 4
# float64: other rows in a product change its rounding; a decision that changes moves logits by far more
TOLERANCE = 1e-9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Labels:
    """What was measured."""

    decoder_safe: bool
    batch_invariant: bool
    generation_safe: bool


def measure_labels(moe: MoEConfig) -> Labels:
    """Build small models with this way of routing, in float64, and try to break each promise."""
    stages = [_model(moe, seed) for seed in range(SEEDS)]
    batch = [_tokens(seed) for seed in range(SEEDS)]
    return Labels(
        decoder_safe=all(_decoder_safe(*pair) for pair in zip(stages, batch, strict=True)),
        batch_invariant=all(_batch_invariant(*pair) for pair in zip(stages, batch, strict=True)),
        generation_safe=all(_generation_safe(*pair) for pair in zip(stages, batch, strict=True)),
    )


def _model(moe: MoEConfig, seed: int) -> GPTStage:
    """Four layers, as many of them sparse as the pattern says, with weights large enough for routing to matter."""
    config = RunConfig.from_dict(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "ffn_hidden_size": 24,
                "vocab_size": VOCAB,
                "init_method_std": 0.3,
            },
            "precision": {"dtype": "fp64"},
            "data": {"seq_length": LENGTH},
            "training": {"global_batch_size": SAMPLES, "micro_batch_size": SAMPLES, "train_iters": 1, "seed": seed},
            "optimizer": {"lr": 1.0},
        }
    )
    state = ParallelState.alone()
    spec = gpt_spec(replace(config, moe=moe), VOCAB)
    stages = build_stages(spec, state)
    initialise_stages(stages, state, seed, CPU)
    return stages[0]


def _tokens(seed: int) -> Tensor:
    """(B, S): no token twice in a sequence, so that no two scores are equal in exact arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCAB, generator=generator)[:LENGTH] for _ in range(SAMPLES)])


@torch.no_grad()
def _logits(stage: GPTStage, tokens: Tensor, *, train: bool) -> Tensor:
    """(B, S, V)."""
    ctx = replace(plain_context(tokens), train=train)
    output: Tensor = stage({}, ctx).tensors["logits"]
    return output.transpose(0, 1)


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _others(tokens: Tensor) -> Iterator[Tensor]:
    """(B, S) other tokens, several times."""
    for trial in range(TRIALS):
        yield (tokens + 7 * (trial + 1)) % VOCAB


def _decoder_safe(stage: GPTStage, tokens: Tensor) -> bool:
    for train in (True, False):
        before = _logits(stage, tokens, train=train)
        for other in _others(tokens):
            for place in (LENGTH - 1, LENGTH // 2):
                changed = torch.cat([tokens[:, :place], other[:, place:]], dim=1)
                if not _same(_logits(stage, changed, train=train)[:, :place], before[:, :place]):
                    return False
    return True


def _batch_invariant(stage: GPTStage, tokens: Tensor) -> bool:
    for train in (True, False):
        before = _logits(stage, tokens, train=train)[0]
        for other in _others(tokens):
            changed = torch.cat([tokens[:1], other[1:]])
            if not _same(_logits(stage, changed, train=train)[0], before):
                return False
    return True


@torch.no_grad()
def _generation_safe(stage: GPTStage, tokens: Tensor) -> bool:
    whole = _logits(stage, tokens, train=False)
    cache = ReservedCache.for_stages([stage], max_length=LENGTH, num_samples=SAMPLES, device=CPU)
    rows = tokens.t()
    found = []
    for position in range(LENGTH):
        before = rows[position - 1] if position else None
        ctx = ForwardContext(
            view=decoding_view(rows[position : position + 1], position, torch.arange(SAMPLES), before),
            random=KeyedRandom(0),
            train=False,
            sequence_parallel=False,
            cache=cache,
        )
        try:
            found.append(stage({}, ctx).tensors["logits"][0])
        except ConfigError:
            return False  # it cannot decode token by token, and says so
    return _same(torch.stack(found, dim=1), whole)
