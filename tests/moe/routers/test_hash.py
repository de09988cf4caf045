"""Hash layers: tables by id, balanced by frequency, MultiHash, and where a table comes from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_layers import layer_of, run_layer
from moe_rows import NOBODY, VOCAB, make_router, token_info, weights_of
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import make_limit
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.routers.hash_tables import balanced_table, random_table
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.parallel.random import KeyedRandom

STREAM = KeyedRandom(3, stream="hash", layer=2)


def hash_config(num_experts: int = 4, choices: int = 1, **options: str) -> MoEConfig:
    return MoEConfig(num_experts=num_experts, router_type="hash", router_topk=choices, router_options=options)


def build(config: MoEConfig, **site: Any) -> Router:
    return build_router(config, 3, Site(NOBODY, torch.float64, **site))


def table_of(config: MoEConfig, vocab_size: int = 1000, layer: int = 0, seed: int = 0) -> Tensor:
    return build(config, vocab_size=vocab_size, layer=layer, seed=seed).get_buffer("table")


def counts_file(folder: Path, counts: Any, name: str = "counts.npy") -> str:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(counts))
    else:
        np.save(path, np.array(counts))
    return str(path)


def test_the_worked_frequencies_are_balanced(tmp_path: Path) -> None:
    # a50 b30 c20 d15 e10 f5 into 3 experts: loads 50, 40, 40
    for name in ("counts.npy", "counts.json"):
        place = counts_file(tmp_path, [50, 30, 20, 15, 10, 5], name)
        table = table_of(hash_config(3, table="balanced", token_counts=place), 6)
        assert table[:, 0].tolist() == [0, 1, 2, 2, 1, 2]
    # whatever the order of the ids: the most frequent goes first
    shuffled = table_of(
        hash_config(3, table="balanced", token_counts=counts_file(tmp_path, [5, 50, 15, 20, 10, 30])), 6
    )
    assert shuffled[:, 0].tolist() == [2, 0, 2, 2, 1, 1]


def test_the_worked_loads_of_mod_are_uneven() -> None:
    router = build(hash_config(3, table="mod"), vocab_size=6)
    info = token_info(6)
    plan = router(torch.zeros(6, 3), info)
    assert plan.expert_ids.tolist() == [token % 3 for token in info.ids.tolist()]
    load = torch.zeros(3).index_add(0, torch.arange(6) % 3, torch.tensor([50.0, 30, 20, 15, 10, 5]))
    assert load.tolist() == [65, 40, 25]
    assert not list(router.parameters()) and not list(router.buffers())


def test_balanced_loads_are_even_in_every_slice() -> None:
    # Zipf: the counts of a natural corpus
    counts = (1e6 / torch.arange(1, 2001, dtype=torch.float64)).floor()
    table = balanced_table(counts, 3, 8, STREAM)
    for column in table.unbind(dim=1):
        load = torch.zeros(8, dtype=torch.float64).index_add(0, column, counts)
        assert (load.max() - load.min()) / load.mean() < 1e-3
    # ids that share an expert in one slice do so in another no more often than if both were drawn by themselves
    for start in (0, 200):
        together = [(column[:, None] == column)[start:, start:].double() for column in table.unbind(dim=1)]
        for first, second in ((0, 1), (0, 2), (1, 2)):
            chance = together[first].mean() * together[second].mean()
            assert (together[first] * together[second]).mean() < 1.2 * chance


def test_ids_that_never_occur_go_where_the_fewest_ids_are() -> None:
    counts = torch.tensor([0.0, 9, 0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    table = balanced_table(counts, 1, 3, STREAM)[:, 0]
    assert table[[1, 3, 4, 5]].tolist() == [0, 1, 2, 1]
    assert sorted(table.bincount().tolist()) == [3, 3, 4]


def test_random_tables_are_even_and_differ_by_layer_seed_and_slice() -> None:
    config = hash_config(8, 2)
    table = table_of(config, 8000)
    assert table.shape == (8000, 2)
    # slice j of expert h is block 2 h + j
    assert (table % 2 == torch.arange(2)).all()
    experts = table // 2
    for column in experts.unbind(dim=1):
        # chi square with 3 degrees of freedom: 16.3 once in a thousand
        assert ((column.bincount(minlength=4) - 2000.0) ** 2 / 2000).sum() < 16.3
    assert torch.equal(table, table_of(config, 8000))
    same = [
        (experts[:, 0] == experts[:, 1]).double().mean(),
        (experts == table_of(config, 8000, layer=1) // 2).double().mean(),
        (experts == table_of(config, 8000, seed=1) // 2).double().mean(),
    ]
    assert [float(share) for share in same] == pytest.approx([0.25] * 3, abs=0.025)
    # the ids that a larger vocabulary shares keep their experts
    assert torch.equal(table, table_of(config, 9000)[:8000])


def test_a_token_goes_where_its_id_says_and_padding_nowhere() -> None:
    router = make_router(hash_config(), 3)
    info = token_info(9, 2, padding=[(8, 0)])
    plan = router(torch.randn(18, 3), info)
    table = router.get_buffer("table")
    wanted = {(token, int(table[id_, 0])): 1.0 for token, id_ in enumerate(info.ids.tolist()) if token != 16}
    assert weights_of(plan) == wanted
    assert not plan.aux_losses and not plan.stats


def test_the_previous_id_decides_and_the_first_token_of_a_document_has_a_row_of_its_own() -> None:
    router = make_router(hash_config(table="previous"), 3)
    info = token_info(9, 2)
    table = router.get_buffer("table")
    assert table.shape == (VOCAB + 1, 1)
    with torch.no_grad():
        table[:, 0] = torch.arange(VOCAB + 1) % 4
    plan = router(torch.randn(18, 3), info)
    assert plan.expert_ids.tolist() == [(before + 1) % 4 for before in info.previous_ids.tolist()]
    assert plan.expert_ids[:2].tolist() == [0, 0]


def test_all_slices_of_one_expert_are_the_whole_expert() -> None:
    # one expert to hash to, in four slices: the dense layer of four times their width
    config = hash_config(4, 4)
    layer = layer_of(make_router(config, 3), ffn_size=5, activation="swiglu")
    hidden = torch.randn(6, 2, 3, dtype=torch.float64)
    found = run_layer(layer, hidden)
    gate, up = layer.experts.w1.transpose(0, 1).flatten(1, 2)
    inner = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
    torch.testing.assert_close(found, inner @ layer.experts.w2.transpose(1, 2).flatten(0, 1))


def test_each_slice_answers_for_the_expert_of_its_own_hash() -> None:
    router = make_router(hash_config(6, 2), 3)
    layer = layer_of(router, ffn_size=5, activation="relu")
    hidden = torch.randn(4, 2, 3, dtype=torch.float64)
    found = run_layer(layer, hidden, tokens=torch.arange(8).view(4, 2))
    table = router.get_buffer("table")
    w1, w2 = layer.experts.w1[:, 0], layer.experts.w2
    for token, row in enumerate(hidden.flatten(0, 1)):
        wanted = sum(w2[block] @ (w1[block] @ row).relu() for block in table[token])
        torch.testing.assert_close(found.flatten(0, 1)[token], wanted)


def test_places_of_slices_are_those_of_their_expert() -> None:
    # 8 tokens of one id: each of its 2 slices has CF · 8 / 2 places, as one of 2 whole experts would
    config = MoEConfig(num_experts=4, router_type="hash", expert_capacity_factor=0.75)
    router = make_router(config, 3)
    info = token_info(8)
    info.ids.fill_(5)
    plan = make_limit(config, router.choices(config), NOBODY)(router(torch.zeros(8, 3), info), info)
    assert sorted(plan.tokens_per_expert().tolist()) == [0, 0, 3, 3]
    assert {token for token, _ in weights_of(plan)} == {0, 1, 2}


def test_a_loaded_table_needs_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = np.arange(VOCAB)
    place = counts_file(tmp_path, counts)
    config = hash_config(table="balanced", token_counts=place)
    router = make_router(config, 3)
    router.before_step(0.0)
    Path(place).unlink()
    later = make_router(config, 3)
    assert "must come from a checkpoint" in caplog.text
    with pytest.raises(ConfigError, match=r"token_counts=.*counts\.npy: there is no such file, and no checkpoint"):
        later.before_step(0.0)
    later.load_state_dict(router.state_dict())
    later.before_step(0.0)
    info = token_info(9)
    assert weights_of(later(torch.zeros(9, 3), info)) == weights_of(router(torch.zeros(9, 3), info))


def test_what_was_loaded_stays_when_the_file_has_changed(tmp_path: Path) -> None:
    config = hash_config(table="balanced", token_counts=counts_file(tmp_path, np.arange(VOCAB)))
    router = make_router(config, 3)
    counts_file(tmp_path, np.arange(VOCAB)[::-1])
    later = make_router(config, 3)
    assert not torch.equal(later.get_buffer("table"), router.get_buffer("table"))
    later.load_state_dict(router.state_dict())
    later.before_step(0.0)
    assert torch.equal(later.get_buffer("table"), router.get_buffer("table"))


def test_counts_of_any_length_pass_while_the_vocabulary_is_unknown(tmp_path: Path) -> None:
    # before the tokenizer is opened, a run is checked with a vocabulary of one
    place = counts_file(tmp_path, np.arange(VOCAB))
    for size in (0, 1, VOCAB):
        build(hash_config(table="balanced", token_counts=place), vocab_size=size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, 3], r"counts 3 ids, but the vocabulary has 23; count again"),
        ([[1] * VOCAB], r"holds int64 of shape \(1, 23\); expected one number for each id"),
        (["a"] * VOCAB, r"expected one number for each id"),
        ([1.0] * (VOCAB - 1) + [float("nan")], r"expected finite numbers of at least 0, and one above it"),
        ([1] * (VOCAB - 1) + [-1], r"expected finite numbers"),
        ([0] * VOCAB, r"one above it"),
    ],
)
def test_wrong_counts_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    config = hash_config(table="balanced", token_counts=counts_file(tmp_path, content))
    with pytest.raises(ConfigError, match=message):
        build(config, vocab_size=VOCAB)


@pytest.mark.parametrize("name", ["broken.npy", "broken.json"])
def test_a_broken_file_is_refused_with_the_tool_that_mends_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("nonsense")
    with pytest.raises(ConfigError, match=r"cannot be read .*tools/inspect_dataset\.py PREFIX --token-counts"):
        build(hash_config(table="balanced", token_counts=str(tmp_path / name)), vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hash_config(5, 2), r"--num-experts 5 cannot be cut into experts of 2 slices"),
        (hash_config(4, 2, table="mod"), r"table=mod is one hash function, but --moe-router-topk 2"),
        (hash_config(4, table="balanced"), r"table=balanced needs token_counts=FILE"),
        (hash_config(4, token_counts="x.npy"), r"token_counts=x\.npy has no effect with table=random"),
        (hash_config(4, table="bigram"), r"table=bigram: expected random, balanced, mod or previous"),
        (
            MoEConfig(num_experts=4, router_type="hash", aux_loss_coeff=0.1),
            r"--moe-aux-loss-coeff 0.1 has no effect with the router hash",
        ),
        (
            MoEConfig(num_experts=4, router_type="hash", slot_priority="k_major", expert_capacity_factor=1.0),
            r"--moe-slot-priority \"k_major\" has no effect",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(config: MoEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config, vocab_size=VOCAB)


def test_a_draw_never_reaches_the_number_of_experts() -> None:
    for num_experts in (1, 3, 7, 1000):
        table = random_table(5000, 1, num_experts, STREAM)
        assert 0 <= int(table.min()) and int(table.max()) < num_experts
