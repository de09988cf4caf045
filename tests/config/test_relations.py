"""Impossible combinations are refused by name, with the way out; their neighbours pass."""

from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.relations import divisors, words
from tests.config.example import sparse

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
CP, EP = "parallel.context_parallel_size", "parallel.expert_model_parallel_size"
ETP, NODE = "parallel.expert_tensor_parallel_size", "parallel.expert_model_parallel_ranks_per_node"
WSD = {"optimizer.lr_decay_style": "WSD", "optimizer.lr_wsd_decay_iters": 60, "optimizer.lr_warmup_iters": 50}

SPANS = {"data.objective": "span_corruption", "model.encoder_num_layers": 2}

# a change that is refused, its message, and the nearest change that passes
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"model.vocab_size": "unset"},
        "--tokenizer-type NullTokenizer knows no vocabulary; give --vocab-size",
        {"model.vocab_size": "unset", "data.tokenizer_type": "ByteTokenizer"},
    ),
    (
        {TP: 3},
        "--num-attention-heads 8 cannot be split over --tensor-model-parallel-size 3; "
        "use a multiple of 3, or a tensor size of 1, 2, 4 or 8.",
        {TP: 4},
    ),
    (
        {TP: 4, "model.num_query_groups": 2},
        "--num-query-groups 2 cannot be split over --tensor-model-parallel-size 4",
        {TP: 2, "model.num_query_groups": 2},
    ),
    (
        {TP: 4, "moe.layer_freq": "2", "model.ffn_hidden_size": 90, "moe.ffn_hidden_size": 64},
        "--ffn-hidden-size 90 cannot be split over --tensor-model-parallel-size 4",
        # no dense layer, no dense width to split
        {TP: 4, "moe.layer_freq": "1", "model.ffn_hidden_size": 90, "moe.ffn_hidden_size": 64},
    ),
    (
        {TP: 2, "moe.shared_expert_intermediate_size": 33},
        "--moe-shared-expert-intermediate-size 33 cannot be split over --tensor-model-parallel-size 2",
        {TP: 2, "moe.shared_expert_intermediate_size": 34},
    ),
    (
        {TP: 2, "model.make_vocab_size_divisible_by": 5},
        "--make-vocab-size-divisible-by 5 cannot be split over --tensor-model-parallel-size 2",
        {TP: 2, "model.make_vocab_size_divisible_by": 6},
    ),
    (
        {CP: 3, "data.seq_length": 48, "parallel.cp_comm_type": "a2a"},
        "--num-attention-heads 8 cannot be shared out over --context-parallel-size 3 by --cp-comm-type a2a; "
        "use a context size of 1, 2, 4 or 8, or --cp-comm-type p2p or all_gather",
        {CP: 3, "data.seq_length": 48, "parallel.cp_comm_type": "p2p"},
    ),
    (
        {CP: 4, TP: 4, "data.seq_length": 64, "parallel.cp_comm_type": "a2a"},
        "--num-attention-heads 8 / --tensor-model-parallel-size 4 = 2 heads cannot be shared out over",
        # a group of key-value heads may be copied
        {CP: 4, TP: 2, "data.seq_length": 64, "parallel.cp_comm_type": "a2a", "model.num_query_groups": 2},
    ),
    (
        {"parallel.sequence_parallel": True},
        "--sequence-parallel has no effect with --tensor-model-parallel-size 1",
        {"parallel.sequence_parallel": True, TP: 2},
    ),
    (
        {"parallel.data_parallel_sharding_strategy": "optim_grads_params", PP: 2},
        "--data-parallel-sharding-strategy optim_grads_params cannot be combined with --pipeline-model-parallel-size 2",
        {"parallel.data_parallel_sharding_strategy": "optim", PP: 2},
    ),
    (
        {
            "parallel.data_parallel_sharding_strategy": "optim_grads_params",
            "parallel.pipeline_schedule": "1f1b_split",
        },
        "within the backward pass, which --pipeline-schedule 1f1b_split puts off; leave the schedule out.",
        {"parallel.data_parallel_sharding_strategy": "optim_grads_params"},
    ),
    (
        {
            "parallel.data_parallel_sharding_strategy": "optim_grads_params",
            "parallel.debug_collectives": True,
        },
        "--debug-collectives cannot look at what --data-parallel-sharding-strategy optim_grads_params sends",
        {"parallel.data_parallel_sharding_strategy": "optim", "parallel.debug_collectives": True},
    ),
    (
        {"data.objective": "span_corruption"},
        "--objective span_corruption needs an encoder to read the corrupted text; give --encoder-num-layers.",
        SPANS,
    ),
    (
        {**SPANS, "data.noise_density": 0.9},
        "--noise-density 0.9 and --mean-noise-span-length 3 leaves no kept token before each span",
        {**SPANS, "data.noise_density": 0.4},
    ),
    (
        {**SPANS, "data.mean_noise_span_length": 13.0},
        "--mean-noise-span-length 13 makes no span; lengthen the sequence, shorten the spans, or cut out more.",
        {**SPANS, "data.mean_noise_span_length": 9.0},
    ),
    (
        {**SPANS, "model.vocab_size": 100},
        "--vocab-size 100 leaves no id to the text beside the sentinels of span corruption, --vocab-extra-ids 100",
        {**SPANS, "model.vocab_size": 101},
    ),
    (
        {**SPANS, "data.seq_length": 512, "data.vocab_extra_ids": 27},
        "--vocab-extra-ids 27 are fewer than the 28 spans of a sample",
        {**SPANS, "data.seq_length": 512, "data.vocab_extra_ids": 28},
    ),
    (
        {**SPANS, CP: 2, "data.seq_length": 36},
        "--seq-length 36 makes targets of 9 tokens, which cannot be cut into 2 x --context-parallel-size 2 equal "
        "pieces; use --seq-length 48.",
        {**SPANS, CP: 2, "data.seq_length": 48},
    ),
    (
        {"model.encoder_num_layers": 1, PP: 6},
        "--encoder-num-layers 1 and --num-layers 4 cannot fill --pipeline-model-parallel-size 6",
        {"model.encoder_num_layers": 2, PP: 6},
    ),
    (
        {"model.encoder_num_layers": 2, "encoder_moe.num_experts": 4, "encoder_moe.layer_freq": "3"},
        "--encoder-moe-layer-freq 3 makes none of --encoder-num-layers 2 sparse",
        {"model.encoder_num_layers": 3, "encoder_moe.num_experts": 4, "encoder_moe.layer_freq": "3"},
    ),
    (
        {"parallel.expert_rank_capacity_factor": 1.5},
        "--moe-expert-rank-capacity-factor 1.5 has no effect with --expert-model-parallel-size 1",
        {"parallel.expert_rank_capacity_factor": 1.5, EP: 2},
    ),
    ({PP: 5}, "--num-layers 4 cannot fill --pipeline-model-parallel-size 5: each stage needs a layer", {PP: 3}),
    (
        {"model.max_position_embeddings": 31},
        "--seq-length 32 is longer than --max-position-embeddings 31",
        {"model.max_position_embeddings": 32},
    ),
    (
        {CP: 2, "data.seq_length": 30},
        "cannot be cut into 2 x --context-parallel-size 2 equal pieces; use a multiple of 4, such as 32.",
        {CP: 1, "data.seq_length": 30},
    ),
    (
        {CP: 4, TP: 4, "data.seq_length": 8},
        "leaves 2 tokens to each of --context-parallel-size 4, too few for --tensor-model-parallel-size 4; "
        "use 16 tokens or more.",
        {CP: 4, TP: 2, "data.seq_length": 8},
    ),
    (
        {"moe.num_experts": "unset", EP: 2},
        "--expert-model-parallel-size 2 has no effect with --num-experts 0 (a dense model)",
        {"moe.num_experts": "unset"},
    ),
    (
        {"moe.num_experts": "unset", ETP: 1},
        "--expert-tensor-parallel-size 1 has no effect with --num-experts 0 (a dense model)",
        {ETP: 1},
    ),
    (
        {"moe.layer_freq": "5"},
        "--moe-layer-freq 5 makes none of --num-layers 4 sparse",
        {"moe.layer_freq": "4"},
    ),
    ({"moe.layer_freq": "0,0,0,0"}, "makes none of --num-layers 4 sparse", {"moe.layer_freq": "0,0,0,1"}),
    ({"moe.layer_freq": "0,1"}, "names 2 layers, but --num-layers is 4", {"moe.layer_freq": "0,1,0,1"}),
    (
        {"moe.num_experts": 6, EP: 4},
        "--num-experts 6 cannot be split over --expert-model-parallel-size 4; "
        "use a multiple of 4, or an expert size of 1, 2, 3 or 6.",
        {"moe.num_experts": 6, EP: 3},
    ),
    (
        {"moe.ffn_hidden_size": 33, ETP: 2},
        "--moe-ffn-hidden-size 33 cannot be split over --expert-tensor-parallel-size 2; "
        "use a multiple of 2, or an expert tensor size of 1, 3, 11 or 33.",
        {"moe.ffn_hidden_size": 33, TP: 2, ETP: 1},
    ),
    (
        {"moe.ffn_hidden_size": 33, TP: 2},
        "--moe-ffn-hidden-size 33 cannot be split over --tensor-model-parallel-size 2",
        {"moe.ffn_hidden_size": 34, TP: 2},
    ),
    (
        {"moe.token_dispatcher_type": "local", EP: 2},
        "--moe-token-dispatcher-type local moves nothing between ranks, but the experts are split over 2",
        {"moe.token_dispatcher_type": "local"},
    ),
    (
        {"moe.token_dispatcher_type": "local", TP: 2},
        "(expert size 1 x expert tensor size 2)",
        {"moe.token_dispatcher_type": "local", TP: 2, ETP: 1},
    ),
    (
        {EP: 4, NODE: 3},
        "--expert-model-parallel-size 4 cannot be split over --expert-model-parallel-ranks-per-node 3; "
        "use a multiple of 3, or a node size of 1, 2 or 4.",
        {EP: 4, NODE: 2},
    ),
    (
        {"moe.token_dispatcher_type": "hierarchical", EP: 4},
        "--moe-token-dispatcher-type hierarchical must know which ranks share a node; give "
        "--expert-model-parallel-ranks-per-node (GPUs of a node / expert tensor size: 1, 2 or 4), or use one_per_rank.",
        {"moe.token_dispatcher_type": "hierarchical", EP: 4, NODE: 4},
    ),
    (
        {"moe.token_dispatcher_type": "hierarchical", EP: 2},
        "give --expert-model-parallel-ranks-per-node",
        # one rank is one node
        {"moe.token_dispatcher_type": "hierarchical"},
    ),
    (
        {"moe.routing_group_samples": 2, "training.micro_batch_size": 1},
        "--micro-batch-size 1 does not hold whole routing groups of --moe-routing-group-samples 2; "
        "use a multiple of 2, or groups of 1.",
        {"moe.routing_group_samples": 2, "training.micro_batch_size": 4},
    ),
    (
        {"optimizer.lr_warmup_iters": 101},
        "--lr-warmup-iters 101 is more than the run's steps, 100",
        {"optimizer.lr_warmup_iters": 100},
    ),
    (
        {"optimizer.lr_warmup_iters": 51, "optimizer.lr_decay_iters": 50},
        "--lr-warmup-iters 51 is more than --lr-decay-iters 50; warm up for 50 steps or fewer.",
        {"optimizer.lr_warmup_iters": 50, "optimizer.lr_decay_iters": 50},
    ),
    (
        WSD,
        "--lr-wsd-decay-iters 60 after --lr-warmup-iters 50 is more than the run's steps, 100; shorten them",
        {**WSD, "optimizer.lr_warmup_iters": 40},
    ),
]


@pytest.mark.parametrize(("wrong", "message", "right"), CASES)
def test_a_relation_is_refused_with_its_way_out_and_its_neighbour_passes(
    wrong: dict[str, Any], message: str, right: dict[str, Any]
) -> None:
    sparse(right)
    with pytest.raises(ConfigError) as caught:
        sparse(wrong)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_divisors_by_trial() -> None:
    for number in range(1, 200):
        assert divisors(number) == [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def test_lists_read_as_sentences() -> None:
    assert words([3]) == "3"
    assert words([1, 2]) == "1 or 2"
    assert words(range(1, 100)) == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ... or 99"
