"""The list of routers: what each says of itself, and what building one shows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.layers.attention import AttentionShape
from megatron_moe.models.depth import build_block
from megatron_moe.models.transformer import LayerSpec
from megatron_moe.moe.methods import METHODS, deciding_part, find_method
from megatron_moe.moe.sparse_layer import SparseLayer
from megatron_moe.parallel.state import ParallelState

EXPERTS, HIDDEN, INNER = 4, 16, 12  # of the small layer that is built


@dataclass(frozen=True)
class RouterLine:
    """One way of routing."""

    name: str
    paper: str
    chooses: str
    causal: bool
    batch_independent: bool
    losses: str
    parameters: int  # beside the experts, of a layer with four experts and hidden size 16
    scores: str
    weights: str
    capacity: str
    good_for: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def example_config(name: str) -> MoEConfig:
    """A small model's [moe] with this way of routing."""
    fixed = {"num_experts": EXPERTS, "ffn_hidden_size": INNER, "layer_freq": "2"}
    return MoEConfig(**{**fixed, **example_fields(name)})


def example_fields(name: str) -> dict[str, Any]:
    """What such a [moe] needs for this way of routing, beside four experts and their width."""
    facts = find_method(name).facts
    return {"router_type": name, "allow_noncausal": True, **({} if facts is None else facts.example)}


def router_line(name: str) -> RouterLine:
    """The line of a name in METHODS, or of path/to/file.py:ClassName."""
    part = deciding_part(_small_layer(example_config(name)))
    facts = part.facts
    if facts is None:
        raise ConfigError(
            f"{name} says nothing of itself; give its class `facts = Facts(...)` of megatron_moe/moe/facts.py."
        )
    return RouterLine(
        name=name,
        paper=facts.paper,
        chooses=facts.chooses,
        causal=part.is_causal,
        batch_independent=facts.batch_independent,
        losses=", ".join(facts.losses) or "none",
        parameters=sum(p.numel() for name, p in part.named_parameters() if not name.startswith("experts.")),
        scores=facts.scores,
        weights=facts.weights,
        capacity=facts.capacity,
        good_for=facts.good_for,
    )


def router_lines(names: Sequence[str] = ()) -> list[RouterLine]:
    """Those of METHODS, in its order, and of further names."""
    return [router_line(name) for name in (*METHODS, *names)]


def _small_layer(moe: MoEConfig) -> SparseLayer:
    shape = AttentionShape(
        hidden_size=HIDDEN,
        num_heads=2,
        num_groups=2,
        head_dim=8,
        causal=True,
        rotary_width=8,
        rotary_base=1e4,
        qk_norm="none",
        norm_epsilon=1e-5,
        init_std=0.02,
        output_std=0.02,
    )
    spec = LayerSpec(1, shape, "RMSNorm", INNER, "swiglu", moe, torch.float32, False, vocab_size=53)
    sparse = build_block(spec, ParallelState.alone()).sparse
    assert sparse is not None
    return sparse
