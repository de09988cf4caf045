"""The cache returns what was put in, and whole passes and cached ones give the same logits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.inference.generate import decoding_view
from megatron_moe.inference.kv_cache import ReservedCache
from megatron_moe.layers.context import ForwardContext
from megatron_moe.models.gpt import GPTStage
from megatron_moe.models.whole import whole_logits
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState
from tests.inference.tiny_models import CPU, VOCAB, Tables, build, tiny_run

SAMPLES, LENGTH = 3, 12
# float64 sums of products in another order; logits are of size ten
TOLERANCE = 1e-9

MODELS: dict[str, tuple[Tables, Tables]] = {
    "dense, tied": ({"num_experts": 0}, {}),
    "dense, one group, norms in heads": ({"num_experts": 0}, {"num_query_groups": 1, "qk_layernorm": "head"}),
    "dense, a group per head, norms over projections": (
        {"num_experts": 0},
        {"num_query_groups": None, "qk_layernorm": "projection"},
    ),
    "dense, no rotary embedding": ({"num_experts": 0}, {"position_embedding_type": "none", "activation": "gelu"}),
    "dense, half rotary": ({"num_experts": 0}, {"rotary_percent": 0.5, "normalization": "LayerNorm"}),
    "top_k": ({}, {}),
    "top_k, untied, shared expert": (
        {"router_pre_softmax": True, "shared_expert_intermediate_size": 8, "shared_expert_gate": True},
        {"untie_embeddings_and_output_weights": True},
    ),
    "switch": ({"router_type": "switch", "router_topk": 1, "layer_freq": "1"}, {}),
    "gshard": ({"router_type": "gshard"}, {}),
    "st_moe, further experts at random": ({"router_type": "st_moe", "router_options": {"eval_policy": "random"}}, {}),
}


def random_tokens() -> Tensor:
    """(B, S)."""
    return torch.randint(VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def cached_logits(stage: GPTStage, tokens: Tensor, cache: ReservedCache, start: int, stop: int) -> Tensor:
    """(B, stop - start, V) of one pass over tokens start..stop, the earlier ones in the cache."""
    view = decoding_view(tokens.t()[start:stop], cache.position, torch.arange(len(tokens)))
    ctx = ForwardContext(view, KeyedRandom(0), train=False, sequence_parallel=False, cache=cache)
    logits: Tensor = stage({}, ctx).tensors["logits"]
    return logits[..., :VOCAB].transpose(0, 1)


def new_cache(stage: GPTStage, length: int = LENGTH) -> ReservedCache:
    return ReservedCache.for_stages([stage], max_length=length, num_samples=SAMPLES, device=CPU)


@pytest.mark.parametrize("cuts", [range(5, LENGTH + 1), (1, 4, LENGTH)], ids=["token by token", "in runs"])
@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_equal_those_of_a_whole_pass(name: str, cuts: Any) -> None:
    (stage,) = build(tiny_run(*MODELS[name]), ParallelState.alone())
    tokens = random_tokens()
    wanted, _ = whole_logits(stage, tokens)
    cache = new_cache(stage)
    found = [
        cached_logits(stage, tokens, cache, start, stop) for start, stop in zip([0, *cuts][:-1], cuts, strict=True)
    ]
    assert wanted.std() > 0.5
    assert float((torch.cat(found, dim=1) - wanted).abs().max()) < TOLERANCE


def test_a_rewound_cache_forgets_what_it_rewound() -> None:
    (stage,) = build(tiny_run(), ParallelState.alone())
    tokens = random_tokens()
    other = (tokens + 1) % VOCAB
    cache = new_cache(stage)
    cached_logits(stage, torch.cat([tokens[:, :5], other[:, 5:]], dim=1), cache, 0, LENGTH)
    cache.rewind(5)
    assert cache.position == 5
    wanted, _ = whole_logits(stage, tokens)
    assert float((cached_logits(stage, tokens, cache, 5, LENGTH) - wanted[:, 5:]).abs().max()) < TOLERANCE


def small_cache() -> ReservedCache:
    heads = {1: (2, 3), 4: (1, 3)}
    return ReservedCache(heads, max_length=4, num_samples=2, dtype=torch.float32, device=CPU)


def filled(rows: int, groups: int, value: float) -> tuple[Tensor, Tensor]:
    return torch.full((rows, 2, groups, 3), value), torch.full((rows, 2, groups, 3), -value)


def test_append_returns_all_so_far_in_order() -> None:
    cache = small_cache()
    cache.append(1, *filled(2, 2, 1.0))
    keys, values = cache.append(1, *filled(1, 2, 2.0))
    assert keys.shape == (3, 2, 2, 3)
    assert keys[:, 0, 0, 0].tolist() == [1, 1, 2]
    assert values[:, 1, 1, 2].tolist() == [-1, -1, -2]


def test_the_position_is_that_of_the_last_layer() -> None:
    cache = small_cache()
    cache.append(1, *filled(2, 2, 1.0))
    assert cache.position == 0
    cache.append(4, *filled(2, 1, 1.0))
    assert cache.position == 2


def test_a_full_cache_refuses_and_keeps_what_it_has() -> None:
    cache = small_cache()
    cache.append(1, *filled(3, 2, 1.0))
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
        cache.append(1, *filled(2, 2, 2.0))
    assert cache.append(1, *filled(1, 2, 3.0))[0][:, 0, 0, 0].tolist() == [1, 1, 1, 3]


@pytest.mark.parametrize("position", [-1, 3])
def test_rewinding_forward_is_refused(position: int) -> None:
    cache = small_cache()
    cache.append(1, *filled(2, 2, 1.0))
    cache.append(4, *filled(2, 1, 1.0))
    with pytest.raises(ValueError, match="holds 2 tokens"):
        cache.rewind(position)
