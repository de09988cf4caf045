"""The nearest name is the one that a person meant."""

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.flags import parse_flags
from megatron_moe.config.hints import MEGATRON_FLAGS, OTHER_NAMES, nearest
from megatron_moe.config.sections import all_settings
from tests.config.example import DENSE_FLAGS

MEANT = {
    # letters slipped
    "--num-layer": "--num-layers",
    "--hiden-size": "--hidden-size",
    "--moe-router-topK": "--moe-router-topk",
    "--swi-glu": "--swiglu",
    "--lr-decay-stile": "--lr-decay-style",
    "--tensor-model-paralel-size": "--tensor-model-parallel-size",
    "--no-sequence-paralel": "--no-sequence-parallel",
    "--weightdecay": "--weight-decay",
    "--adam-beta-2": "--adam-beta2",
    "--moe-aux-loss-coef": "--moe-aux-loss-coeff",
    "--moe_router_topk": "--moe-router-topk",
    "--datapath": "--data-path",
    "--conf": "--config",
    # a part left out
    "--topk": "--moe-router-topk",
    "--moe-topk": "--moe-router-topk",
    "--tensor-parallel-size": "--tensor-model-parallel-size",
    "--expert-parallel-size": "--expert-model-parallel-size",
    "--heads": "--num-attention-heads",
    "--warmup": "--lr-warmup-iters",
    "--z-loss": "--moe-z-loss-coeff",
    "--wsd-decay-iters": "--lr-wsd-decay-iters",
    "--dispatcher": "--moe-token-dispatcher-type",
    "--micro-batch": "--micro-batch-size",
    "--clip": "--clip-grad",
    "--tensorboard": "--tensorboard-dir",
    "--moe-num-experts": "--num-experts",
    # another name for it
    "--tp": "--tensor-model-parallel-size",
    "--ep-size": "--expert-model-parallel-size",
    "--learning-rate": "--lr",
    "--num-hidden-layers": "--num-layers",
    "--num-key-value-heads": "--num-query-groups",
    "--num-experts-per-tok": "--moe-router-topk",
    "--capacity-factor": "--moe-expert-capacity-factor",
    "--max-steps": "--train-iters",
    "--save-dir": "--save",
    "--bfloat16": "--bf16",
    "--recipe": "--config",
}


@pytest.mark.parametrize(("written", "meant"), MEANT.items())
def test_an_unknown_flag_is_answered_with_the_one_that_was_meant(written: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags([*DENSE_FLAGS, written, "2"])
    assert str(caught.value) == f"there is no option {written}; did you mean '{meant}'?"


@pytest.mark.parametrize("word", ["--xyzzy", "--foo", "--q", "--colour-of-the-sky"])
def test_no_hint_is_better_than_a_wild_guess(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags([word])
    assert str(caught.value) == f"there is no option {word}; --help lists them all."


def test_a_flag_of_megatron_that_is_needless_here_is_explained() -> None:
    with pytest.raises(ConfigError, match="no linear layer here has a bias; leave it out"):
        parse_flags(["--disable-bias-linear"])


def test_every_unknown_flag_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(["--num-layer=3", "--fp16", "--hiden-size", "4"])
    assert all(word in str(caught.value) for word in ("--num-layer;", "--fp16:", "--hiden-size;"))


def test_hints_lead_to_options_that_exist_and_excuse_only_those_that_do_not() -> None:
    names = {setting.name for setting in all_settings().values()} | {"bf16", "config"}
    assert set(OTHER_NAMES.values()) <= names
    assert not set(MEGATRON_FLAGS) & {setting.flag for setting in all_settings().values()}


def test_nearest_prefers_the_same_name_in_another_spelling() -> None:
    assert nearest("Router-TopK", ["router_type", "router_topk"]) == "router_topk"
    assert nearest("anything", []) is None
