"""Product-key memories: the worked example, the definition, sizes, statistics."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_checks import ask, draw
from moe.unrouted.memories import CASES, fill, make_memory, plain
from moe_rows import token_info
from torch import Tensor

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.moe.unrouted.memory import MemoryLayer
from megatron_moe.parallel.layout import layout_of
from megatron_moe.training.validate import validate


def options(**given: str) -> dict[str, Any]:
    return {"router_type": "product_keys", "router_options": {"key_dim": "4", **given}}


def worked(kind: str, **given: str) -> MemoryLayer:
    """Nine cells of nine experts' width one; the query is the token."""
    fields = {
        "router_type": kind,
        "router_options": {"num_subkeys": "6", "key_dim": "4", "query_norm": "none", **given},
    }
    if kind == "product_keys_ffn":
        fields["activation"] = "relu"
    layer = make_memory(fields, hidden=4)
    # the three sub-keys of the example, and three that are never near
    first = [[1, 0], [0, 1], [0.5, 0.5]] + [[-9, -9]] * 3
    second = [[0, 1], [1, -1], [-1, 0]] + [[-9, 9]] * 3
    fill(layer, query=torch.eye(4), sub_keys=[first, second], values=[[cell, 1, 0, 0] for cell in range(36)])
    return layer


EXAMPLE = torch.tensor([[1.0, 0.0, 0.5, -1.0]], dtype=torch.float64)


def test_worked_example() -> None:
    # scores 2.5 (first and second sub-key) and 2 (third and second), weights .6225 and .3775
    mixed = ask(worked("product_keys", heads="1", knn="2"), EXAMPLE)
    assert mixed.answers.tolist() == [pytest.approx([0.6225 * 1 + 0.3775 * 13, 1.0, 0.0, 0.0], abs=1e-3)]
    entropy = -(0.6225 * torch.tensor(0.6225).log() + 0.3775 * torch.tensor(0.3775).log())
    assert float(mixed.report.stats["entropy_sum"]) == pytest.approx(float(entropy), abs=1e-4)
    # cells 1 and 13 of 36, in runs of nine
    assert mixed.report.stats["tokens_per_expert"].tolist() == [1, 1, 0, 0]


def test_worked_example_as_a_feed_forward_layer() -> None:
    mixed = ask(worked("product_keys_ffn", active_cells="2"), EXAMPLE)
    assert mixed.answers.tolist() == [pytest.approx([2.5 * 1 + 2.0 * 13, 4.5, 0.0, 0.0])]
    assert "entropy_sum" not in mixed.report.stats


def normalised(query: list[float], kind: str) -> list[float]:
    if kind == "none":
        return query
    mean = sum(query) / len(query)
    variance = sum((number - mean) ** 2 for number in query) / len(query)
    return [(number - mean) / (variance + 1e-5) ** 0.5 for number in query]


def by_hand(layer: MemoryLayer, token: Tensor, heads: int, knn: int, norm: str, activation: str | None) -> list[float]:
    """The definition: every cell of every head is scored."""
    names = ("query", "query_bias", "sub_keys", "values")
    query, bias, sub_keys, values = (layer.get_parameter(name).detach() for name in names)
    width, answer = query.shape[0] // heads, torch.zeros(6, dtype=torch.float64)
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        whole = torch.tensor(normalised((query[rows] @ token).tolist(), norm), dtype=torch.float64) + bias[rows]
        first, second = (sub_keys[head, half] @ whole.chunk(2)[half] for half in (0, 1))
        sums = [float(a + b) for a, b in itertools.product(first, second)]
        best = sorted(range(len(sums)), key=lambda cell, sums=sums: -sums[cell])[:knn]
        scores = torch.tensor([sums[cell] for cell in best], dtype=torch.float64)
        weights = (
            scores.softmax(dim=0) if activation is None else [plain(activation, score) for score in scores.tolist()]
        )
        answer += sum(weight * values[cell] for weight, cell in zip(weights, best, strict=True))
    return answer.tolist()


@pytest.mark.parametrize(
    ("fields", "heads", "knn", "norm"),
    [
        (options(heads="2", knn="3"), 2, 3, "layer"),
        (options(heads="1", knn="16"), 1, 16, "layer"),
        ({**options(heads="4", query_norm="none"), "router_topk": 1}, 4, 1, "none"),
        ({**CASES["product_keys_ffn"], "activation": "relu"}, 1, 8, "layer"),
        ({**CASES["product_keys_ffn"], "activation": "gelu"}, 1, 8, "layer"),
    ],
)
def test_it_follows_the_definition(fields: dict[str, Any], heads: int, knn: int, norm: str) -> None:
    layer, tokens = make_memory(fields), draw(5)
    fill(layer, query_bias=torch.linspace(-0.4, 0.5, layer.get_parameter("query_bias").numel()))
    wanted = [by_hand(layer, token, heads, knn, norm, fields.get("activation")) for token in tokens]
    assert ask(layer, tokens).answers.tolist() == [pytest.approx(row) for row in wanted]
    assert ask(layer, tokens, train=False).answers.tolist() == [pytest.approx(row) for row in wanted]


def test_a_memory_that_always_reads_the_same_cells_is_seen_in_its_uses() -> None:
    layer = make_memory(options(heads="2", knn="2"))
    spread = ask(layer, draw(200)).report.stats["tokens_per_expert"]
    assert int(spread.sum()) == 800 and (spread > 0).all()
    # sub-keys 0 and 1 of the first half, 0 of the second, beat all others
    keys = torch.zeros(2, 2, 4, 2)
    fill(layer, query=torch.zeros(8, 6), query_bias=torch.ones(8), sub_keys=keys.index_fill(2, torch.tensor([0]), 9.0))
    assert ask(layer, draw(200)).report.stats["tokens_per_expert"].tolist() == [800, 0, 0, 0]


def test_first_values_are_those_of_the_paper() -> None:
    layer = make_memory({**options(key_dim="64", heads="2", num_subkeys="40", knn="4")}, hidden=50)
    assert layer.get_parameter("values").shape == (1600, 50)
    assert layer.get_parameter("values").std().item() == pytest.approx(50**-0.5, rel=0.02)
    # uniform between ±32^-0.5 has this deviation
    assert layer.get_parameter("sub_keys").std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.05)
    assert not layer.get_parameter("query_bias").any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"router_options": {}, "ffn_hidden_size": 12},
            r"48 cells \(num_experts x their width\) are not the square .* --num-experts 4.* num_subkeys=6, without",
        ),
        ({"num_experts": 3, "ffn_hidden_size": 10}, r"30 cells .* give --moe-router-options num_subkeys=6, without"),
        (
            {"router_options": {"num_subkeys": "7"}, "ffn_hidden_size": None},
            r"49 cells \(num_subkeys=7\) .* num_subkeys=8",
        ),
        (
            {"router_options": {"num_subkeys": "6"}},
            r"num_subkeys=6 makes 36 cells, but .* 16 makes 64; leave one of them",
        ),
        ({"router_options": {"key_dim": "7"}}, r"key_dim=7: expected an even number"),
        ({"router_options": {"heads": "5"}}, r"32 active cells .* evenly to .* heads=5; give knn="),
        ({"router_options": {"knn": "65"}}, r"knn=65 asks for more than the memory's 64 cells"),
        ({"router_options": {"knn": "6"}, "router_topk": 3}, r"--moe-router-topk 3 has no effect .* knn=6"),
        ({"router_options": {"query_norm": "group"}}, r"query_norm=group: expected layer, batch or none"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_way_out(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config({"router_type": "product_keys", "ffn_hidden_size": 16, **fields}, {}, {}))


def test_the_way_out_is_one() -> None:
    for experts, root in ((4, "6"), (3, "6"), (4, "8")):
        moe = {"num_experts": experts, "ffn_hidden_size": None, "router_options": {"num_subkeys": root, "knn": "2"}}
        validate(tiny_config({"router_type": "product_keys", **moe}, {}, {}))


def test_batch_norm_is_remembered_for_evaluation() -> None:
    layer = make_memory(CASES["product_keys, batch"])
    assert not layer.is_causal
    tokens, info = draw(8) + 2.0, token_info(4, 2, group_samples=2)
    before = ask(layer, tokens, train=False).answers
    own = {name: value.double() for name, value in ask(layer, tokens, info).report.stats.items()}
    layer.after_step(own, own)
    assert not torch.equal(ask(layer, tokens, train=False).answers, before)
    queries = (tokens @ layer.get_parameter("query").t()).detach()
    torch.testing.assert_close(layer.state_dict()["batch_norm.running_mean"], 0.1 * queries.mean(dim=0))
    others = make_memory(options())
    kept = {name: value.clone() for name, value in others.state_dict().items()}
    others.after_step(own, own)
    assert all(torch.equal(value, kept[name]) for name, value in others.state_dict().items())


def test_the_entropy_of_a_head_is_reported_for_real_tokens() -> None:
    layer, tokens = make_memory(options(heads="2", knn="3", key_dim="4")), draw(4)
    info = token_info(4, padding=[(3, 0)])
    found = ask(layer, tokens, info).report.stats["entropy_sum"]
    fill(layer, sub_keys=torch.zeros_like(layer.get_parameter("sub_keys")))
    # equal scores: three cells with a third each
    even = ask(layer, tokens, info).report.stats["entropy_sum"]
    assert 0.0 < found.item() < even.item() == pytest.approx(3 * math.log(3))


def test_a_feed_forward_layer_of_cells_starts_with_its_values_and_the_shift_is_not_decayed() -> None:
    for name, wanted in (("product_keys_ffn", 0.25), ("product_keys", 6**-0.5)):
        layer = make_memory(CASES[name])
        layer.site = replace(layer.site, output_std=0.25)
        assert layer.value_std() == pytest.approx(wanted)
        assert not layout_of(layer.get_parameter("query_bias")).decay
    layer = make_memory(CASES["vanilla_memory"])
    layer.site = replace(layer.site, output_std=0.25)
    assert layer.value_std() == 0.25
