"""Tiny models in float64, and what they say by repeated whole passes: the reference for decoding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.inference.generate import Generator
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.gpt import GPTStage
from megatron_moe.models.whole import whole_logits
from megatron_moe.parallel.state import ParallelState

VOCAB, SEED = 61, 5
CPU = torch.device("cpu")
Tables = Mapping[str, Any]


def tiny_run(moe: Tables | None = None, model: Tables | None = None, parallel: Tables | None = None) -> RunConfig:
    """Four layers, every second one sparse with four experts; {"num_experts": 0} makes all of them dense.

    First weights are large, so that the model does not repeat itself.
    """
    sparse = {"num_experts": 4, "layer_freq": "2", "ffn_hidden_size": 12, **(moe or {})}
    return RunConfig.from_dict(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 16,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 24,
                "vocab_size": VOCAB,
                "make_vocab_size_divisible_by": 8,
                "init_method_std": 0.5,
                **(model or {}),
            },
            "moe": sparse if sparse["num_experts"] else {},
            "parallel": parallel or {},
            "precision": {"dtype": "fp64"},
            "data": {"seq_length": 32},
            "training": {"global_batch_size": 4, "micro_batch_size": 4, "train_iters": 1},
            "optimizer": {"lr": 0.01},
        }
    )


def build(run: RunConfig, state: ParallelState) -> list[GPTStage]:
    stages = build_stages(gpt_spec(run, VOCAB), state)
    initialise_stages(stages, state, SEED, CPU)
    return stages


def generator_of(run: RunConfig, state: ParallelState | None = None, **options: Any) -> Generator:
    state = state or ParallelState.alone()
    stages = build(run, state)
    return Generator(stages, state, stages[0].spec, CPU, **options)


def greedy_by_whole_passes(stage: GPTStage, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest token, again and again, each from a pass over everything so far, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        logits, _ = whole_logits(stage, torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]
