"""Expert capacity when tokens come one at a time: what it does then, and how it is lifted.

A capacity is a share of the tokens that are routed together. A prompt is limited as in evaluation; a token that is
decoded comes alone, and is served where the rounding leaves an expert a place for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.models.gpt import GPTSpec, GPTStage
from megatron_moe.moe.capacity import exact, expert_places, make_limit
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.methods import Method, find_method
from megatron_moe.moe.routers.mixture_of_depths import UNDECODABLE
from megatron_moe.moe.routers.options import parse_options
from megatron_moe.moe.routers.router import Router
from megatron_moe.parallel.state import ParallelState


def decoding_notes(spec: GPTSpec) -> list[str]:
    """What a person should know before reading text of this model; usually nothing."""
    found = [note for layer in spec.layers if layer.moe is not None for note in _notes(layer.moe)]
    return list(dict.fromkeys(found))


def refuse_undecodable(spec: GPTSpec) -> None:
    """Raises ConfigError for a model of which a layer needs whole sequences; the same on all ranks."""
    for layer in spec.layers:
        if layer.moe is None:
            continue
        method = find_method(layer.moe.router_type)
        if _wraps_block(method) and parse_options(method.Options, layer.moe).inference == "top_k":
            raise ConfigError(UNDECODABLE)


def lift_capacity(stages: Sequence[GPTStage], state: ParallelState) -> None:
    """Let every expert of these stages take all tokens that chose it. ConfigError when the model limits nothing."""
    specs = [layer for stage in stages for layer in stage.spec.layers if layer.moe is not None]
    if all(_eval_factor(layer.moe) is None for layer in specs if layer.moe is not None):
        raise ConfigError("--dropless has no effect: this model was trained without a capacity; leave it out.")
    for stage in stages:
        for index, layer in stage.moe_layers().items():
            moe = stage.spec.layers[index].moe
            if moe is not None and isinstance(layer, MoELayer):
                unlimited = replace(moe, expert_capacity_factor=None, eval_capacity_factor=None)
                layer.limit = make_limit(unlimited, 1, state.tp_cp)


def _eval_factor(moe: MoEConfig) -> float | None:
    return moe.eval_capacity_factor if moe.eval_capacity_factor is not None else moe.expert_capacity_factor


def _wraps_block(method: Method) -> bool:
    return issubclass(method, Router) and method.wraps_block


def _notes(moe: MoEConfig) -> Iterator[str]:
    router = find_method(moe.router_type)
    # a block that may be decoded at all decides token by token
    if not router.is_causal and not _wraps_block(router):
        yield (
            f"the router {moe.router_type} decides over tokens that it sees together; decoded one at a time they are "
            f"routed otherwise than in a whole sequence"
        )
    factor = _eval_factor(moe)
    if factor is None:
        return
    choices = router.choices(moe) if moe.capacity_includes_k else 1
    share = exact(factor) * choices / moe.num_experts
    alone = expert_places(torch.tensor(1), share=share, rounding=moe.capacity_rounding, at_least=moe.min_capacity)
    if alone == 0:
        yield (
            f"a capacity factor of {factor:g} rounded by {moe.capacity_rounding} leaves no place to a token that comes "
            f"alone: every decoded token passes the experts by; --dropless serves it"
        )
