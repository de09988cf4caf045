"""The blocks of a small sparse model as ranks of an expert-parallel world hold them, for the tests of accounting."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.parallel.blocks import Block
from tests.checkpoint.samples import ALONE, HastyStorage, whole_block

EXPERTS, HIDDEN, WIDTH = 4, 3, 2


def expert(layer: int, number: int, weight: str) -> str:
    return f"layers.{layer}.mlp.experts.{number}.{weight}"


def moe_blocks(seed: int = 0, experts: int = EXPERTS) -> list[Block]:
    """Two layers, each with a router and experts of two matrices; the embedding in two halves."""
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(6, HIDDEN, generator=random)
    blocks = [
        Block("embedding.weight", (6, HIDDEN), (start, 0), table[start : start + 3], primary=True) for start in (0, 3)
    ]
    for layer in (0, 1):
        blocks.append(whole_block(f"layers.{layer}.mlp.router.weight", torch.randn(experts, HIDDEN, generator=random)))
        for number in range(experts):
            first = torch.randn(2, WIDTH, HIDDEN, generator=random)
            blocks.append(whole_block(expert(layer, number, "w1"), first))
            blocks.append(whole_block(expert(layer, number, "w2"), torch.randn(HIDDEN, WIDTH, generator=random)))
    return blocks


def optimizer_blocks(model: Sequence[Block], seed: int = 9) -> list[Block]:
    """A moment for each weight, in float64."""
    random = torch.Generator().manual_seed(seed)
    return [
        Block(
            f"exp_avg/{block.name}",
            block.global_shape,
            block.offset,
            torch.randn(block.shape, generator=random, dtype=torch.float64),
            primary=True,
        )
        for block in model
    ]


def save_moe(root: Path, blocks: Sequence[Block], step: int = 1, run_id: str = "run") -> Path:
    """The folder of the step."""
    writer = CheckpointWriter(root, ALONE, None, run_id, HastyStorage(), background=False)
    parts = {"model": blocks, "optim": optimizer_blocks(blocks)}
    writer.save(step, parts, {"samples": 8 * step}, '{"moe": {}}', {"corpus": "x"})
    return root / f"step_{step:08d}"
