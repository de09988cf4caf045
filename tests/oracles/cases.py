"""From a case's name to its numbers, and from a case to the router under test."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from layers.contexts import context
from moe_rows import NOBODY, VOCAB, token_info
from oracles.case import Case

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router, build_unrouted, find_method
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.options import parse_options
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.moe.unrouted.unrouted_layer import LayerSite, UnroutedLayer
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState

ARRAYS = (
    *("ids", "previous_ids", "positions", "sequences", "is_padding", "groups", "keys"),
    *("global_keys", "sample_keys", "passes"),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one question: tokens stand in `samples` sequences of `length`, the last ones of some are padding."""

    length: int = 6
    samples: int = 3
    hidden: int = 5
    experts: int = 4
    train: bool = True
    seed: int = 0


def info_of(fields: Mapping[str, Any], shape: Shape) -> TokenInfo:
    padding = [(shape.length - 1, 0)] if shape.length > 1 else []
    padding += [(0, shape.samples - 1)] if shape.samples > 1 else []
    group = int(fields.get("routing_group_samples", 1))
    return token_info(
        shape.length, shape.samples, group_samples=group, padding=padding, train=shape.train, seed=1 + shape.seed
    )


def make_case(name: str, fields: Mapping[str, Any], shape: Shape) -> Case:
    """Numbers are drawn from the case's name and shape; the router says only which parameters it has."""
    fields = {"num_experts": shape.experts, **fields}
    config = MoEConfig(**fields)
    seed = 1 + shape.seed
    part = bare_part(config, shape.hidden, seed)
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{name} {shape}".encode()).digest()[:8], "little"))
    tokens = draw.normal(size=(shape.length * shape.samples, shape.hidden))
    parameters = {key: draw.normal(size=tuple(value.shape)) for key, value in part.named_parameters()}
    state = {key: value.numpy() for key, value in part.named_buffers()}
    info = info_of(fields, shape)
    return Case(
        name=name,
        fields=fields,
        options=asdict(parse_options(find_method(config.router_type).Options, config)),
        tokens=tokens,
        parameters=parameters,
        state={key: _other_state(value, draw) for key, value in state.items()},
        info={key: getattr(info, key).numpy() for key in ARRAYS},
        num_groups=info.num_groups,
        train=shape.train,
        seed=seed,
        vocab_size=VOCAB,
        expert_keys=draw.normal(size=(config.num_experts, shape.hidden)) if _reads_keys(part) else None,
    )


def _reads_keys(part: Router | UnroutedLayer) -> bool:
    return isinstance(part, Router) and part.reads_expert_keys


def _other_state(value: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A remembered number that is not its first value; whole numbers (tables, flags) stay as they are."""
    if not np.issubdtype(value.dtype, np.floating):
        return value
    return value + 0.1 * draw.random(size=value.shape)


def bare_part(config: MoEConfig, hidden: int, seed: int, dtype: torch.dtype = torch.float64) -> Router | UnroutedLayer:
    """The router, or the layer that needs none, in memory."""
    part: Router | UnroutedLayer
    if issubclass(find_method(config.router_type), UnroutedLayer):
        site = LayerSite(
            index=3,
            hidden_size=hidden,
            ffn_size=config.ffn_hidden_size or 1,
            activation=config.activation or "swiglu",
            init_std=0.5,
            output_std=0.5,
            dtype=dtype,
            state=ParallelState.alone(),
        )
        part = build_unrouted(config, site)
    else:
        part = build_router(config, hidden, Site(NOBODY, dtype, 0.5, layer=3, vocab_size=VOCAB, seed=seed))
    materialise(part, ParallelState.alone(), 7, torch.device("cpu"))
    return part


def part_of(case: Case, dtype: torch.dtype) -> Router | UnroutedLayer:
    """The code under test with a case's numbers."""
    part = bare_part(MoEConfig(**case.fields), case.tokens.shape[1], case.seed, dtype)
    with torch.no_grad():
        for key, parameter in part.named_parameters():
            parameter.copy_(torch.from_numpy(case.parameters[key]))
        for key, buffer in part.named_buffers():
            buffer.copy_(torch.from_numpy(np.asarray(case.state[key])))
    return part


def ask_router(case: Case, info: TokenInfo, dtype: torch.dtype = torch.float64) -> RoutingPlan:
    """The plan of the code under test."""
    router = part_of(case, dtype)
    with torch.no_grad():
        if case.expert_keys is not None:
            info = dataclasses.replace(info, expert_keys=torch.from_numpy(case.expert_keys).to(dtype))
        plan: RoutingPlan = router(torch.from_numpy(case.tokens).to(dtype), info)
    return plan


def ask_layer(case: Case, info: TokenInfo, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """(T, H) answers of a layer without assignments, zero for padding as the whole layer gives them."""
    layer = part_of(case, dtype)
    assert isinstance(layer, UnroutedLayer)
    samples = len(info.sequence_tokens)
    with torch.no_grad():
        tokens = torch.from_numpy(case.tokens).to(dtype)
        mixed = layer.mix(tokens, info, context(len(tokens) // samples, samples, ParallelState.alone()))
        answers: np.ndarray = mixed.answers.masked_fill(info.is_padding[:, None], 0.0).double().numpy()
    return answers
