"""FLOPs per token against published figures and sums done by hand."""

from typing import Any

import pytest

from megatron_moe.config.run import RunConfig
from megatron_moe.training.flops import flops_per_token, formula_text, peak_flops


def config(model: dict[str, Any], moe: dict[str, Any] | None = None, seq_length: int = 4096) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"vocab_size": 64, **model},  # not read: the caller of flops_per_token knows better
            "moe": moe or {},
            "data": {"seq_length": seq_length},
            "training": {"global_batch_size": 8, "train_iters": 10},
            "optimizer": {"lr": 1e-3},
        }
    )


def qwen3(num_layers: int, hidden: int, heads: int, expert_width: int) -> RunConfig:
    model = {"num_layers": num_layers, "hidden_size": hidden, "num_attention_heads": heads, "num_query_groups": 4}
    moe = {"num_experts": 128, "router_topk": 8, "ffn_hidden_size": expert_width}
    return config({**model, "kv_channels": 128, "qk_layernorm": "head"}, moe)


def test_qwen3_30b_a3b_is_23_gflop_per_token() -> None:
    assert flops_per_token(qwen3(48, 2048, 32, 768), 151_936) == pytest.approx(23.01e9, rel=0.005)


def test_qwen3_235b_a22b_is_148_gflop_per_token() -> None:
    assert flops_per_token(qwen3(94, 4096, 64, 1536), 151_936) == pytest.approx(148.0e9, rel=0.005)


def test_mixtral_8x7b_by_hand() -> None:
    model = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8}
    mixtral = config({**model, "ffn_hidden_size": 14336}, {"num_experts": 8, "router_topk": 2})
    # q and output 4096², k and v 4096·1024, all times 2; scores 4·4096·4096/2; experts 6·2·4096·14336
    layer = 2 * (4096 * 4096 * 2 + 4096 * 1024 * 2) + 33_554_432 + 704_643_072
    assert flops_per_token(mixtral, 32_000) == 3 * (32 * layer + 2 * 4096 * 32_000) == 79_706_456_064


def test_every_second_layer_sparse_with_a_shared_expert_by_hand() -> None:
    model = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 256}
    moe = {"num_experts": 8, "router_topk": 2, "layer_freq": "2", "ffn_hidden_size": 32}
    found = flops_per_token(config(model, {**moe, "shared_expert_intermediate_size": 48}, seq_length=16), 100)
    attention = 2 * 4 * 64 * 64 + 2 * 16 * 64
    dense, sparse = 6 * 64 * 256, 6 * 64 * (2 * 32 + 48)
    assert found == 3 * (4 * attention + 2 * dense + 2 * sparse + 2 * 64 * 100)


def test_an_mlp_without_a_gate_has_two_products() -> None:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "activation": "gelu"}
    assert flops_per_token(config(model, seq_length=2), 10) == 3 * (2 * 4 * 64 + 2 * 2 * 8 + 4 * 8 * 32 + 2 * 8 * 10)


def test_a_router_with_one_choice_counts_one_expert() -> None:
    model = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8}
    switch = flops_per_token(config(model, {"num_experts": 4, "router_type": "switch"}), 100)
    assert switch == flops_per_token(config(model, {"num_experts": 4, "router_topk": 1}), 100)
    assert switch == flops_per_token(config(model), 100)


@pytest.mark.parametrize(
    ("router", "moe", "layer"),
    [
        # 48 keys as wide as a token, and 5 values
        ("vanilla_memory", {"active_cells": "5"}, 2 * 8 * 48 + 2 * 8 * 5),
        # to width 3, 48 keys of that width, 5 values
        ("low_rank_keys", {"active_cells": "5", "rank": "3"}, 2 * 8 * 3 + 2 * 3 * 48 + 2 * 8 * 5),
        # two queries of width 6, 2 x 8 sub-keys of width 3 for each, 4 values each
        ("product_keys", {"heads": "2", "key_dim": "6", "knn": "4", "num_subkeys": "8"}, 2 * (8 * 12 + 96 + 8 * 8)),
        ("product_keys_ffn", {"key_dim": "6", "active_cells": "4", "num_subkeys": "8"}, 2 * (8 * 6 + 48 + 8 * 4)),
        # all of it, whatever is chosen
        ("controller", {"active_cells": "12"}, 4 * 8 * 48),
        # 4 experts with 3 slots in a sample of 16 tokens; all tokens into all slots and back
        ("soft_moe", {"slots": "3"}, 4 * 8 * 12 * 12 / 16 + 4 * 12 * 8),
        # one expert, and in each sample the sum of four
        ("smear", {}, 4 * 8 * 12 + 2 * 4 * (2 * 8 * 12) / 16),
    ],
)
def test_a_layer_without_assignments_counts_what_it_multiplies(router: str, moe: dict[str, str], layer: float) -> None:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "activation": "relu"}
    width = {} if "num_subkeys" in moe else {"ffn_hidden_size": 12}
    fields = {"num_experts": 4, "router_type": router, "router_options": moe, **width}
    around = 2 * 4 * 64 + 2 * 16 * 8 + 2 * 8 * 10
    assert flops_per_token(config(model, fields, seq_length=16), 10) == pytest.approx(3 * (around + layer))


def test_the_peak_is_that_of_the_data_sheet() -> None:
    assert peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce RTX 3060") is None


def test_the_formula_says_what_figures_of_others_must_agree_on() -> None:
    for word in ("causal", "routers, norms and embeddings are not counted", "MFU", "data-sheet"):
        assert word in formula_text()
