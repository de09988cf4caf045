"""The command line: derived from the sections, in Megatron's spelling, with errors that name the flag."""

import re
from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.flags import build_parser, parse_flags
from megatron_moe.config.sections import all_settings, section_types

# What Megatron's users type, section 2 of its compatibility notes, where this project has the feature.
MEGATRON_SPELLINGS = """
--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size
--expert-tensor-parallel-size --sequence-parallel --use-distributed-optimizer --data-parallel-sharding-strategy
--ddp-bucket-size --distributed-backend --distributed-timeout-minutes --num-experts --moe-layer-freq
--moe-ffn-hidden-size --moe-router-topk --moe-aux-loss-coeff --moe-z-loss-coeff --moe-router-pre-softmax
--moe-token-dispatcher-type --moe-expert-capacity-factor --moe-token-drop-policy --moe-shared-expert-intermediate-size
--moe-shared-expert-gate --num-layers --hidden-size --ffn-hidden-size --num-attention-heads --num-query-groups
--kv-channels --max-position-embeddings --position-embedding-type --rotary-base --rotary-percent
--make-vocab-size-divisible-by --normalization --norm-epsilon --swiglu --qk-layernorm
--untie-embeddings-and-output-weights --init-method-std --data-path --split --seq-length --num-workers
--reset-position-ids --reset-attention-mask --eod-mask-loss --tokenizer-type --tokenizer-model --vocab-file
--merge-file --vocab-size --micro-batch-size --global-batch-size --train-iters --train-samples --lr --min-lr
--lr-decay-style --lr-decay-iters --lr-warmup-iters --lr-wsd-decay-iters --lr-wsd-decay-style --weight-decay
--clip-grad --optimizer --adam-beta1 --adam-beta2 --adam-eps --bf16 --seed --exit-interval --exit-duration-in-mins
--eval-iters --eval-interval --no-check-for-nan-in-loss-and-grad --save --load --save-interval --no-load-optim
--finetune --ckpt-step --async-save --exit-on-missing-checkpoint --log-interval --tensorboard-dir
""".split()
HELP = build_parser("pretrain").format_help()


def options_in(text: str) -> list[str]:
    """The flags that head an entry of a help text."""
    heads = [line for line in text.splitlines() if re.match(r"  --", line)]
    return [word for head in heads for word in re.findall(r"--[a-z0-9-]+", head.split("   ")[0])]


def test_flags_have_megatrons_spelling() -> None:
    assert set(MEGATRON_SPELLINGS) <= set(options_in(HELP))


def test_help_shows_each_flag_once() -> None:
    listed = options_in(HELP)
    assert len(listed) == len(set(listed))
    assert {setting.flag for setting in all_settings().values()} <= set(listed)


def test_help_is_grouped_by_section_in_order() -> None:
    headings = re.findall(r"^([a-z_]+):$", HELP, flags=re.MULTILINE)
    assert headings == ["options", *section_types()]
    groups = re.split(r"^[a-z_]+:$", HELP, flags=re.MULTILINE)[2:]
    for section, group in zip(section_types(), groups, strict=True):
        own = [setting.flag for key, setting in all_settings().items() if key.startswith(f"{section}.")]
        assert [flag for flag in options_in(group) if flag in own] == own


def test_every_option_has_a_help_text_with_its_default() -> None:
    text = " ".join(HELP.split())
    assert all(len(setting.option.help) > 5 for setting in all_settings().values())
    for sentence in ("query heads in a layer (required)", "0.01 in Switch", "(default false)", "(default cosine)"):
        assert sentence in text
    # an option that is unset has no default to show; five are choices: norms; expert bias and extra layer of two stacks
    assert text.count("(default none)") == 5
    assert "(default [])" not in text and "(default {})" not in text


def test_help_leaves_with_success_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_flags(["--help"], "pretrain")
    assert left.value.code == 0
    assert "usage: pretrain [--config FILE]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--num-layers 12", "model.num_layers", 12),
        ("--num-layers=12", "model.num_layers", 12),
        ("--lr 3e-4", "optimizer.lr", 3e-4),
        ("--lr 1", "optimizer.lr", 1.0),
        ("--swiglu", "model.activation", "swiglu"),
        ("--activation swiglu --geglu", "model.activation", "geglu"),
        ("--bf16", "precision.dtype", "bf16"),
        ("--bf16 --dtype fp32", "precision.dtype", "fp32"),
        ("--qk-layernorm", "model.qk_layernorm", "head"),
        ("--qk-layernorm projection", "model.qk_layernorm", "projection"),
        ("--sequence-parallel", "parallel.sequence_parallel", True),
        ("--no-sequence-parallel", "parallel.sequence_parallel", False),
        ("--no-load-optim", "checkpoint.no_load_optim", True),
        ("--load-optim", "checkpoint.no_load_optim", False),
        ("--no-async-save", "checkpoint.async_save", False),
        ("--no-check-for-nan-in-loss-and-grad", "training.check_for_nan_in_loss_and_grad", False),
        ("--moe-expert-capacity-factor none", "moe.expert_capacity_factor", None),
        ("--save none", "checkpoint.save", None),
        ("--save ./none", "checkpoint.save", "./none"),
        ("--data-path 0.3 a 0.7 b", "data.data_path", ("0.3", "a", "0.7", "b")),
        ("--data-path", "data.data_path", ()),
        ("--moe-router-options jitter=0.1 name=a=b", "moe.router_options", {"jitter": "0.1", "name": "a=b"}),
        ("--moe-router-options a=1 --moe-router-options b=2", "moe.router_options", {"a": "1", "b": "2"}),
        ("--moe-router-options a=1 --moe-router-options --moe-router-options b=2", "moe.router_options", {"b": "2"}),
    ],
)
def test_what_a_flag_gives(words: str, key: str, value: Any) -> None:
    given = parse_flags(words.split()).values
    assert given == {key: value}
    assert type(given[key]) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--moe-router-topk 0", "--moe-router-topk 0: expected an integer of at least 1."),
        ("--moe-router-topk two", "--moe-router-topk two: expected an integer of at least 1."),
        ("--moe-router-topk 2.0", "--moe-router-topk 2.0: expected an integer of at least 1."),
        ("--lr nan", "--lr nan: expected a number above 0."),
        ("--num-layers none", "--num-layers none: expected an integer of at least 1."),
        (
            "--activation swiglue",
            "--activation swiglue: expected swiglu, geglu, geglu_tanh, gelu or relu; did you mean 'swiglu'?",
        ),
        ("--moe-router-options jitter", "--moe-router-options jitter: expected name=value, such as jitter=0.1."),
        ("--moe-router-options =1", "--moe-router-options =1: expected name=value"),
        ("--lr", "--lr: expected one argument; see --help."),
        ("--swiglu=yes", "ignored explicit argument 'yes'; see --help."),
        ("--swiglu yes", "'yes' belongs to no option"),
        ("train", "'train' belongs to no option"),
        ("--config a.toml --config b.toml", "--config was given 2 times; give one file"),
        ("--moe-router-top 2", "there is no option --moe-router-top; did you mean '--moe-router-topk'?"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(words.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
