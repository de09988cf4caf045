"""Tokens for router tests: a small batch, what a rule may know of it, and its rows as several ranks would hold them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import Axis, ParallelState

# six tokens' logits for four experts, whose routing was worked out by hand
GOLDEN_LOGITS = [
    [2.0, 1.0, 0.0, -1.0],
    [1.5, 0.5, 0.4, 0.0],
    [3.0, 0.2, -1.0, 0.0],
    [0.0, 2.0, 1.0, 0.5],
    [1.0, 0.9, 0.0, -0.5],
    [0.2, 0.1, 0.0, 0.4],
]

VOCAB = 23

NOBODY = ParallelState.alone().tp_cp


def token_info(
    length: int,
    samples: int = 1,
    *,
    group_samples: int = 1,
    padding: Sequence[tuple[int, int]] = (),
    train: bool = True,
    seed: int = 1,
) -> TokenInfo:
    """Whole groups on one rank, rows position-major.  padding: (position, sample) of tokens that are none."""
    position = torch.arange(length).repeat_interleave(samples)
    sample = torch.arange(samples).repeat(length)
    is_padding = torch.zeros(length, samples, dtype=torch.bool)
    for place in padding:
        is_padding[place] = True
    is_padding = is_padding.flatten()
    groups = sample // group_samples
    num_groups = -(-samples // group_samples)
    return TokenInfo(
        ids=(5 * position + 7 * sample) % VOCAB,
        previous_ids=((5 * (position - 1) + 7 * sample) % VOCAB).where(position > 0, -1),
        positions=position,
        sequences=sample,
        is_padding=is_padding,
        groups=groups,
        keys=position * group_samples + sample % group_samples,
        global_keys=(sample << 32) + position,
        sample_keys=sample,
        passes=torch.zeros_like(position),
        num_groups=num_groups,
        group_size=length * group_samples,
        group_tokens=groups[~is_padding].bincount(minlength=num_groups),
        sequence_tokens=sample[~is_padding].bincount(minlength=samples),
        sequence_groups=torch.arange(samples) // group_samples,
        sequence_keys=torch.arange(samples),
        random=KeyedRandom(seed, stream="router", layer=3),
        train=train,
    )


def rows_of(info: TokenInfo, rows: Tensor) -> TokenInfo:
    """What a rank knows that holds only these rows; the groups' own numbers stay whole."""
    names = (
        *("ids", "previous_ids", "positions", "sequences", "is_padding", "groups", "keys"),
        *("global_keys", "sample_keys", "passes"),
    )
    return replace(info, **{name: getattr(info, name)[rows] for name in names})


def make_router(
    config: MoEConfig, hidden_size: int, *, axis: Axis = NOBODY, dtype: torch.dtype = torch.float64
) -> Router:
    """A router with its first weights, the same on every rank; a matrix of zeros, which would hide faults, is drawn."""
    router = build_router(config, hidden_size, Site(axis, dtype, 0.5, vocab_size=VOCAB))
    materialise(router, ParallelState.alone(), 7, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return router


def golden_router(config: MoEConfig, *, dtype: torch.dtype = torch.float64) -> tuple[Router, Tensor]:
    """A router of four experts and the six tokens for which its logits are GOLDEN_LOGITS."""
    router = make_router(config, 4, dtype=dtype)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(4))
    return router, torch.tensor(GOLDEN_LOGITS, dtype=dtype)


def pairs(plan: RoutingPlan) -> set[tuple[int, int]]:
    """(token, expert) of every assignment that somebody serves."""
    found = zip(plan.token_ids.tolist(), plan.expert_ids.tolist(), strict=True)
    return {(token, expert) for token, expert in found if expert < plan.num_experts}


def weights_of(plan: RoutingPlan, rows: Tensor | None = None) -> dict[tuple[int, int], float]:
    """The weight of every served (token, expert); tokens are numbered by `rows` where a rank holds only these."""
    tokens = plan.token_ids if rows is None or not rows.numel() else rows[plan.token_ids]
    table = zip(tokens.tolist(), plan.expert_ids.tolist(), plan.combine_weights.tolist(), strict=True)
    return {(token, expert): weight for token, expert, weight in table if expert < plan.num_experts}


def tp_state(rank: int, world_size: int) -> ParallelState:
    """Ranks that share every routing group; for use within run_on_ranks."""
    return ParallelState.distributed(Grid(world_size, tp=world_size))
