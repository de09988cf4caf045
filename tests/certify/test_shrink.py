"""A recipe made tiny keeps every choice that it makes."""

from pathlib import Path

import pytest

from megatron_moe.certify.shrink import shrink
from megatron_moe.config.errors import ConfigError
from megatron_moe.training.validate import validate

EXAMPLES = Path(__file__).parents[2] / "examples"


def _recipe(folder: Path, model: str = "", moe: str = "") -> Path:
    file = folder / "some.toml"
    sizes = "num_layers = 48\nhidden_size = 2048\nnum_attention_heads = 32\nvocab_size = 151936\n"
    file.write_text(f"[model]\n{sizes}{model}\n[moe]\nnum_experts = 128\n{moe}\n")
    return file


def test_sizes_go_down_and_choices_stay(tmp_path: Path) -> None:
    model = 'num_query_groups = 4\nkv_channels = 128\nqk_layernorm = "head"\nactivation = "geglu"\n'
    moe = "router_topk = 8\nffn_hidden_size = 768\nexpert_capacity_factor = 1.5\nmin_capacity = 4\n"
    shrunk = shrink(_recipe(tmp_path, model, moe), {"aux_loss_coeff": 0.1})
    tiny = shrunk.subject
    assert tiny.model["num_attention_heads"] // tiny.model["num_query_groups"] == 8
    assert tiny.model["qk_layernorm"] == "head" and tiny.model["activation"] == "geglu"
    assert tiny.moe["router_topk"] == 8 and tiny.moe["num_experts"] == 16
    assert tiny.moe["expert_capacity_factor"] == 1.5 and tiny.moe["aux_loss_coeff"] == 0.1
    assert tiny.model["kv_channels"] != tiny.model["hidden_size"] // tiny.model["num_attention_heads"]
    assert tiny.model["hidden_size"] <= 32 and tiny.model["vocab_size"] < 100
    assert {"model.num_layers: 48 -> 4", "moe.num_experts: 128 -> 16", "moe.min_capacity: 4 -> 1"} <= set(shrunk.lines)
    assert not any("router_topk" in line for line in shrunk.lines)
    validate(tiny.config({}, 1))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("1", "1,1,1,1"),
        ("2", "0,1,0,1"),
        ("4", "0,0,0,1"),
        ("12", "0,1,0,1"),
        (",".join(["0"] * 3 + ["1"] * 45), "0,0,0,1"),
        (",".join(["0"] * 6 + ["1"] * 42), "0,1,1,1"),
        (",".join(["1"] * 48), "1,1,1,1"),
    ],
)
def test_the_pattern_of_layers_stays(pattern: str, expected: str, tmp_path: Path) -> None:
    shrunk = shrink(_recipe(tmp_path, moe=f'layer_freq = "{pattern}"'), {})
    assert shrunk.subject.moe["layer_freq"] == expected


def test_a_head_stays_wide_enough_for_its_rotation(tmp_path: Path) -> None:
    tiny = shrink(_recipe(tmp_path, "rotary_percent = 0.25"), {}).subject
    assert tiny.model["hidden_size"] // tiny.model["num_attention_heads"] == 8


def test_both_stacks_of_the_st_moe_example_are_kept() -> None:
    tiny = shrink(EXAMPLES / "st_moe" / "recipe.toml", {}).subject
    assert tiny.encoder_moe is not None
    for stack in (tiny.moe, tiny.encoder_moe):
        assert (stack["router_type"], stack["extra_ffn"], stack["expert_capacity_factor"]) == ("st_moe", "after", 1.25)
    assert tiny.model["position_embedding_type"] == "relative" and tiny.model["encoder_num_layers"] == 4


def test_groups_of_experts_have_as_many_as_they_need(tmp_path: Path) -> None:
    moe = 'router_type = "deepseek_v3"\nrouter_topk = 4\n[moe.router_options]\nnum_groups = "16"\ntopk_groups = "4"\n'
    assert shrink(_recipe(tmp_path, moe=moe), {}).subject.moe["num_experts"] >= 16


def test_what_cannot_be_made_tiny_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tiny model of 4 to 128 experts makes this recipe's choices: .*nobody"):
        shrink(_recipe(tmp_path, moe='router_type = "nobody"'), {})
    with pytest.raises(ConfigError, match="some.toml: .moe. has no option 'zzz'"):
        shrink(_recipe(tmp_path, moe="zzz = 1"), {})
