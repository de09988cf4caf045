"""The tiny model that is certified, and its samples: each a pure function of its number; some are padded or packed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, Stream

VOCAB, LENGTH, GLOBAL_BATCH, STEPS = 61, 8, 4, 3


def tiny_config(
    moe: Mapping[str, Any],
    parallel: Mapping[str, Any],
    model: Mapping[str, Any],
    micro_batch_size: int = 1,
    dtype: str = "fp64",
) -> RunConfig:
    """Four layers, every second one sparse with four experts; {"num_experts": 0} makes all of them dense."""
    sparse = {"num_experts": 4, "layer_freq": "2", "ffn_hidden_size": 12, **moe}
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
                **model,
            },
            "moe": sparse if sparse["num_experts"] else {},
            "parallel": parallel,
            "precision": {"dtype": dtype},
            "data": {"seq_length": LENGTH},
            "training": {"global_batch_size": GLOBAL_BATCH, "train_iters": STEPS, "micro_batch_size": micro_batch_size},
            "optimizer": {"lr": 0.01, "clip_grad": 0.5},
        }
    )


def samples(numbers: Sequence[int]) -> Batch:
    """The samples with these numbers: one in three ends in padding, one in three holds two documents.

    No token comes twice in a sample: two that repeat at a document's start have equal scores in exact arithmetic, and
    which of them an expert prefers would be a matter of rounding.
    """
    tokens = torch.tensor(
        np.stack([np.random.default_rng(1000 + number).permutation(VOCAB)[: LENGTH + 1] for number in numbers])
    )
    segments = torch.zeros(len(numbers), LENGTH, dtype=torch.int32)
    mask = torch.ones(len(numbers), LENGTH)
    for row, number in enumerate(numbers):
        if number % 3 == 0:
            segments[row, 5:], mask[row, 5:] = -1, 0.0
        if number % 3 == 1:
            segments[row, 3:] = 1
    stream = Stream(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=mask,
        position_ids=torch.arange(LENGTH).repeat(len(numbers), 1),
        segments=segments,
    )
    return Batch({"decoder": stream}, torch.tensor(list(numbers)))
