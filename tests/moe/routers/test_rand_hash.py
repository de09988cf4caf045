"""RandHash: each id keeps b different blocks, drawn evenly among all sets of blocks."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from moe_layers import layer_of, run_layer
from moe_rows import NOBODY, make_router, token_info, weights_of
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.routers.hash_tables import distinct_table
from megatron_moe.moe.routers.router import Site
from megatron_moe.parallel.random import KeyedRandom


def rand_hash(num_experts: int, choices: int) -> MoEConfig:
    return MoEConfig(num_experts=num_experts, router_type="rand_hash", router_topk=choices)


def table_of(vocab_size: int, *, layer: int = 0, seed: int = 0) -> Tensor:
    site = Site(NOBODY, vocab_size=vocab_size, layer=layer, seed=seed)
    return build_router(rand_hash(16, 3), 4, site).get_buffer("table")


def test_every_set_of_blocks_is_as_likely_as_any_other() -> None:
    table = distinct_table(20_000, 3, 6, KeyedRandom(1, stream="rand_hash"))
    found = Counter(tuple(sorted(row)) for row in table.tolist())
    assert set(found) == set(combinations(range(6), 3))  # so the three are always different ones
    # chi square with 19 degrees of freedom: 43.8 once in a thousand
    assert sum((number - 1000) ** 2 / 1000 for number in found.values()) < 43.8


def test_all_blocks_and_one_block_are_possible() -> None:
    stream = KeyedRandom(1, stream="rand_hash")
    assert distinct_table(50, 5, 5, stream).sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 50
    single = distinct_table(5000, 1, 5, stream)[:, 0].bincount()
    assert single.tolist() == pytest.approx([1000] * 5, rel=0.1)


def test_maps_are_kept_for_a_seed_and_differ_by_layer_and_seed() -> None:
    table = table_of(2000)
    assert torch.equal(table, table_of(2000))
    assert torch.equal(table, table_of(3000)[:2000])
    for other in (table_of(2000, layer=1), table_of(2000, seed=1)):
        shared = (table[:, :, None] == other[:, None, :]).sum() / table.numel()
        assert shared.item() == pytest.approx(3 / 16, abs=0.02)


def test_equal_ids_have_equal_blocks_wherever_they_stand() -> None:
    router = make_router(rand_hash(16, 3), 4)
    info = token_info(30, 2, padding=[(29, 1)])
    plan = router(torch.randn(60, 4), info)
    table = router.get_buffer("table").tolist()
    ids = info.ids.tolist()
    assert weights_of(plan) == {(token, block): 1.0 for token in range(59) for block in table[ids[token]]}
    assert not list(router.parameters()) and not plan.aux_losses


def test_all_blocks_together_are_the_wide_layer() -> None:
    layer = layer_of(make_router(rand_hash(5, 5), 4), ffn_size=3, activation="gelu")
    hidden = torch.randn(7, 2, 4, dtype=torch.float64)
    w1, w2 = layer.experts.w1.flatten(0, 2), layer.experts.w2.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(run_layer(layer, hidden), torch.nn.functional.gelu(hidden @ w1.T) @ w2)


def test_what_has_no_effect_is_refused() -> None:
    for fields, flag in (
        ({"z_loss_coeff": 0.1}, "--moe-z-loss-coeff"),
        ({"router_options": {"b": "2"}}, "no such option"),
    ):
        with pytest.raises(ConfigError, match=flag):
            build_router(MoEConfig(num_experts=4, router_type="rand_hash", **fields), 4, Site(NOBODY))
