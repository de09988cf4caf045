"""Single flipped bits in numbers that several ranks hold, on the usual layouts, and who holds them.

What is held by several is found by the rectangles of the checkpoint, not by the axes that the check goes along.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.messages import gather_to_all
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine, grid_of
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.tiny_job import CPU, job

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
ETP, SHARDING = "expert_tensor_parallel_size", "data_parallel_sharding_strategy"
# a bias for each expert that the router remembers
ROUTER: dict[str, Any] = {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0, "layer_freq": "1"}


@dataclass(frozen=True)
class Layout:
    """world_size ranks; `kinds`: what of them must be held by several.

    weights_last: a step updates the weights from themselves, and does not write them anew.
    """

    world_size: int
    parallel: dict[str, Any]
    kinds: frozenset[str]
    dtype: str = "fp32"
    weights_last: bool = True

    def job(self, corpus: Path, **changes: Any) -> RunConfig:
        precision = {"dtype": self.dtype}
        return job(corpus, moe=ROUTER, parallel=self.parallel, precision=precision, **changes)


WEIGHTS = frozenset({"dense", "expert", "router", "norm", "embedding", "state"})
ALL = WEIGHTS | {"moments"}
LAYOUTS = {
    "DP 2": Layout(2, {SHARDING: "no_shard"}, ALL | {"master"}, "bf16", False),
    "DP 2, ZeRO-1": Layout(2, {}, WEIGHTS, "bf16", False),
    "DP 4": Layout(4, {SHARDING: "no_shard"}, ALL),
    "TP 2 x EP 2": Layout(4, {TP: 2, EP: 2, ETP: 1, SHARDING: "no_shard"}, ALL),
    # the optimizer's part for norms and routers is the same on both ranks of tp, and experts have no replica
    "TP 2 x EP 2, ZeRO-1": Layout(4, {TP: 2, EP: 2}, ALL - {"expert"}, weights_last=False),
    "PP 2": Layout(2, {PP: 2}, frozenset({"embedding", "moments"})),
    "DP 2 x TP 2, ZeRO-3": Layout(
        4, {TP: 2, SHARDING: "optim_grads_params"}, frozenset({"router", "norm", "state", "moments"})
    ),
}


def kind_of(name: str) -> str:
    for prefix, kind in (("exp_avg", "moments"), ("master", "master")):
        if name.startswith(prefix):
            return kind
    kinds = {".experts.": "expert", "expert_bias": "state", **{word: word for word in ("router", "norm", "embedding")}}
    return next((kind for word, kind in kinds.items() if word in name), "dense")


Place = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, offset, shape


def place_of(block: Block) -> Place:
    return block.name, block.offset, block.shape


def blocks_of(engine: Engine) -> dict[Place, Tensor]:
    """Views of all that a checkpoint would keep of this rank."""
    return {place_of(block): block.tensor for block in [*engine.weight_blocks(), *engine.optimizer.blocks()]}


def held_by_several(trainer: Trainer) -> dict[Place, list[int]]:
    """The ranks that hold each rectangle which is on more than one, in one order everywhere. Collective."""
    holders: dict[Place, list[int]] = {}
    mine = [place for place, tensor in blocks_of(trainer.engine).items() if tensor.numel()]
    for rank, told in enumerate(gather_to_all(json.dumps(mine), trainer.state.world, CPU)):
        for name, offset, shape in json.loads(told):
            holders.setdefault((name, tuple(offset), tuple(shape)), []).append(rank)
    return {place: ranks for place, ranks in sorted(holders.items()) if len(ranks) > 1}


@dataclass(frozen=True)
class Flip:
    """One bit of one rank's copy."""

    place: Place
    holders: list[int]
    rank: int
    bit: int

    @classmethod
    def draw(cls, number: int, rng: random.Random, holders: dict[Place, list[int]]) -> "Flip":
        """The kinds of tensors come in turn, the rest is random."""
        kinds = sorted({kind_of(place[0]) for place in holders})
        kind = kinds[number % len(kinds)]
        place = rng.choice([place for place in holders if kind_of(place[0]) == kind])
        return cls(place, holders[place], rng.choice(holders[place]), rng.getrandbits(62))

    def strike(self, engine: Engine) -> None:
        """On the rank that it is about: flip, or flip back."""
        tensor = blocks_of(engine)[self.place]
        index = self.bit // 8 % (tensor.numel() * tensor.element_size())
        element = tensor.view(-1)[index // tensor.element_size()].view(1)
        element.view(torch.uint8)[index % tensor.element_size()] ^= 1 << self.bit % 8

    @property
    def verdict(self) -> str:
        """What must be said of it."""
        others = [rank for rank in self.holders if rank != self.rank]
        if len(others) > 1:
            return f"ranks {[self.rank]} differ from ranks {others}, which agree"
        one, two = self.holders
        return f"ranks {[one]} and ranks {[two]} differ, and no majority"


def make_trainer(text: str, world_size: int) -> Trainer:
    config = RunConfig.from_json(text)
    return Trainer(config, ParallelState.distributed(grid_of(config, world_size)), CPU)
