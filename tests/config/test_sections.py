"""What sections derive from their own values, and what they refuse by themselves."""

from typing import Any

import pytest

from megatron_moe.config.checkpoint import CheckpointConfig
from megatron_moe.config.data import DataConfig
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.training import TrainingConfig


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, **changes})


def test_model_derives_its_widths() -> None:
    assert (model().head_dim, model().groups, model().ffn_size, model().rotary_dim) == (8, 8, 256, 8)
    other = model(kv_channels=16, num_query_groups=2, ffn_hidden_size=100, rotary_percent=0.25)
    assert (other.head_dim, other.groups, other.ffn_size, other.rotary_dim) == (16, 2, 100, 4)


def test_vocabulary_is_padded_to_a_multiple() -> None:
    assert [model().padded_vocab_size(size) for size in (1, 128, 129)] == [128, 128, 256]
    assert model(make_vocab_size_divisible_by=1).padded_vocab_size(50257) == 50257


def test_layers_are_sparse_by_number_or_by_list() -> None:
    assert MoEConfig(num_experts=8).moe_layers(3) == (True, True, True)
    assert MoEConfig(num_experts=8, layer_freq="2").moe_layers(5) == (False, True, False, True, False)
    assert MoEConfig(num_experts=8, layer_freq="[1, 0,1]").moe_layers(3) == (True, False, True)
    assert MoEConfig(layer_freq="1").moe_layers(2) == (False, False)


def test_a_layer_list_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="names 2 layers, but --num-layers is 3; write one 0 or 1 for each"):
        MoEConfig(num_experts=8, layer_freq="0,1").moe_layers(3)


def test_expert_width_follows_the_dense_one_unless_given() -> None:
    assert MoEConfig().expert_ffn_size(256) == 256
    assert MoEConfig(ffn_hidden_size=32).expert_ffn_size(256) == 32


def test_parallel_sizes_of_both_views() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        context_parallel_size=2,
        expert_model_parallel_size=4,
    )
    assert parallel.model_parallel_size == 8
    assert parallel.data_parallel_size(32) == 4
    assert parallel.expert_tensor == 2
    assert parallel.expert_data_parallel_size(32) == 2
    assert ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=1).expert_tensor == 1


def test_sequence_parallel_is_on_with_tensor_parallel_unless_turned_off() -> None:
    assert not ParallelConfig().uses_sequence_parallel
    assert ParallelConfig(tensor_model_parallel_size=2).uses_sequence_parallel
    assert not ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=False).uses_sequence_parallel


def test_what_data_parallel_ranks_split_is_said_in_two_ways() -> None:
    def split(**given: Any) -> tuple[bool, bool]:
        config = ParallelConfig(**given)
        return config.shards_optimizer, config.shards_parameters

    assert split() == split(use_distributed_optimizer=True) == (True, False)
    assert split(use_distributed_optimizer=False) == (False, False)
    ways = {"no_shard": (False, False), "optim": (True, False), "optim_grads_params": (True, True)}
    for strategy, expected in ways.items():
        assert split(data_parallel_sharding_strategy=strategy) == expected
        assert split(data_parallel_sharding_strategy=strategy, use_distributed_optimizer=expected[0]) == expected


def test_data_paths_come_with_weights_or_without() -> None:
    assert DataConfig(seq_length=1).prefixes == ()
    plain = DataConfig(seq_length=1, data_path=("a", "b"))
    assert (plain.prefixes, plain.weights) == (("a", "b"), None)
    blend = DataConfig(seq_length=1, data_path=("3", "a", "0.5", "./7"))
    assert (blend.prefixes, blend.weights) == (("a", "./7"), (3.0, 0.5))


def test_split_shares_add_up_to_one() -> None:
    assert DataConfig(seq_length=1, split="8,1,1").split_fractions == (0.8, 0.1, 0.1)
    assert DataConfig(seq_length=1, split="5").split_fractions == (1.0, 0.0, 0.0)


def test_steps_are_given_directly_or_in_samples() -> None:
    assert TrainingConfig(global_batch_size=8, train_iters=5).num_steps == 5
    assert TrainingConfig(global_batch_size=8, train_samples=47).num_steps == 5


def test_latest_means_the_directory_of_save() -> None:
    assert CheckpointConfig(save="runs", load="latest").load_directory == "runs"
    assert CheckpointConfig(load="old").load_directory == "old"
    assert CheckpointConfig().load_directory is None


def test_decay_ends_with_the_run_unless_said() -> None:
    assert OptimizerConfig(lr=1.0).decay_steps(50) == 50
    assert OptimizerConfig(lr=1.0, lr_decay_iters=20).decay_steps(50) == 20


SEQUENCE = {"seq_length": 8}
BATCH = {"global_batch_size": 8, "train_iters": 1}
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (MoEConfig, {"layer_freq": "0"}, "expected a number N"),
    (MoEConfig, {"layer_freq": "0,2"}, "expected a number N"),
    (MoEConfig, {"layer_freq": ""}, "expected a number N"),
    (MoEConfig, {"num_experts": 4, "router_topk": 5}, "asks for more experts than --num-experts 4; use 4 or fewer."),
    (DataConfig, {**SEQUENCE, "split": "1,1,1,1"}, "expected up to three shares"),
    (DataConfig, {**SEQUENCE, "split": "1,-1,1"}, "expected up to three shares"),
    (DataConfig, {**SEQUENCE, "split": "0,0,0"}, "expected up to three shares"),
    (DataConfig, {**SEQUENCE, "split": "1,x"}, "expected up to three shares"),
    (DataConfig, {**SEQUENCE, "split": "1,nan"}, "expected up to three shares"),
    (DataConfig, {**SEQUENCE, "data_path": ("1", "a", "b")}, "expected a positive weight before each prefix"),
    (DataConfig, {**SEQUENCE, "data_path": ("a", "1", "b", "2")}, "expected a positive weight before each prefix"),
    (DataConfig, {**SEQUENCE, "data_path": ("0", "a", "1", "b")}, "expected a positive weight before each prefix"),
    (DataConfig, {**SEQUENCE, "data_path": ("1", "2")}, "a prefix that looks like a number is written ./3"),
    (
        DataConfig,
        {**SEQUENCE, "tokenizer_type": "SentencePieceTokenizer"},
        "--tokenizer-type SentencePieceTokenizer needs --tokenizer-model",
    ),
    (
        DataConfig,
        {**SEQUENCE, "tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"},
        "--tokenizer-type GPT2BPETokenizer needs --merge-file",
    ),
    (DataConfig, {**SEQUENCE, "merge_file": "m"}, "leave it out, or use --tokenizer-type GPT2BPETokenizer."),
    (
        DataConfig,
        {**SEQUENCE, "tokenizer_model": "m"},
        "leave it out, or use --tokenizer-type SentencePieceTokenizer or HuggingFaceTokenizer.",
    ),
    (TrainingConfig, {"global_batch_size": 8}, "one of --train-iters and --train-samples says how long to train"),
    (TrainingConfig, {**BATCH, "train_samples": 9}, "not both; give exactly one of them"),
    (TrainingConfig, {**BATCH, "micro_batch_size": 3}, "--global-batch-size 8 is no multiple of --micro-batch-size 3"),
    (TrainingConfig, {"global_batch_size": 8, "train_samples": 7}, "less than one --global-batch-size 8"),
    (OptimizerConfig, {"lr": 0.1, "min_lr": 0.2}, "--min-lr 0.2 is above the peak, --lr 0.1"),
    (OptimizerConfig, {"lr": 0.1, "lr_decay_style": "WSD"}, "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (
        ParallelConfig,
        {"use_distributed_optimizer": True, "data_parallel_sharding_strategy": "no_shard"},
        "--use-distributed-optimizer contradicts --data-parallel-sharding-strategy no_shard; leave it out.",
    ),
    (
        ParallelConfig,
        {"use_distributed_optimizer": False, "data_parallel_sharding_strategy": "optim_grads_params"},
        "--no-use-distributed-optimizer contradicts --data-parallel-sharding-strategy optim_grads_params; leave",
    ),
    (CheckpointConfig, {"save_interval": 5}, "--save-interval 5 needs a directory to save to; give --save."),
    (CheckpointConfig, {"load": "latest"}, "--load latest means the directory of --save; give --save"),
]
HEADS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 60}, "--hidden-size 60 cannot be split over --num-attention-heads 8; use a multiple of 8"),
    ({"num_query_groups": 3}, "--num-attention-heads 8 cannot be shared by --num-query-groups 3"),
    ({"kv_channels": 5}, "so that it is even"),
    ({"rotary_percent": 0.1}, "rotary embedding turns pairs, but --rotary-percent 0.1 of a head of width 8 is 0"),
]


@pytest.mark.parametrize(("section", "values", "message"), REFUSED)
def test_what_a_section_refuses(section: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(("values", "message"), HEADS)
def test_heads_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model(**values)
    assert message in str(caught.value)


def test_heads_of_any_width_pass_when_it_is_said() -> None:
    assert model(hidden_size=60, kv_channels=8).head_dim == 8
    assert model(kv_channels=5, position_embedding_type="none").head_dim == 5
