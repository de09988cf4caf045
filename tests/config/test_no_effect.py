"""What somebody set has an effect, or is refused."""

from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.no_effect import RULES
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sections import all_settings
from tests.config.example import DENSE_FLAGS, dense, sparse

DENSE_MODEL = "has no effect with --num-experts 0 (a dense model); leave it out, or give --num-experts."
MOE_VALUES: dict[str, Any] = {
    "layer_freq": "2",
    "ffn_hidden_size": 64,
    "router_type": "switch",
    "router_topk": 2,
    "router_pre_softmax": True,
    "aux_loss_coeff": 0.01,
    "z_loss_coeff": 0.001,
    "expert_capacity_factor": 1.0,
    "eval_capacity_factor": 2.0,
    "token_drop_policy": "probs",
    "capacity_includes_k": False,
    "capacity_rounding": "floor",
    "min_capacity": 4,
    "slot_priority": "k_major",
    "shared_expert_intermediate_size": 64,
    "shared_expert_gate": True,
    "shared_expert_overlap": False,
    "token_dispatcher_type": "alltoall",
    "routing_group_samples": 1,
    "router_options": {"jitter": "0.1"},
    "allow_noncausal": True,
    "activation": "relu",
    "expert_bias": "additive",
    "expert_dropout": 0.4,
    "extra_ffn": "after",
    "consistency_coeff": 5.0,
    "consistency_cross_entropy": "mean",
    "aux_layer_reduction": "mean",
}


def test_the_values_above_are_all_of_moe() -> None:
    assert {f"moe.{name}" for name in MOE_VALUES} == {
        key for key in all_settings() if key.startswith("moe.") and key != "moe.num_experts"
    }


@pytest.mark.parametrize("name", MOE_VALUES)
def test_moe_options_need_experts(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dense({f"moe.{name}": MOE_VALUES[name]})
    setting = all_settings()[f"moe.{name}"]
    assert str(caught.value).startswith((setting.flag, setting.negative_flag))
    assert str(caught.value).endswith(DENSE_MODEL)


@pytest.mark.parametrize("name", [*MOE_VALUES, "num_experts"])
def test_options_of_an_encoder_need_one(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^--(no-)?encoder-.* has no effect without an encoder; .*--encoder-num-layers"
    ):
        dense({f"encoder_moe.{name}": MOE_VALUES.get(name, 4)})


@pytest.mark.parametrize("name", MOE_VALUES)
def test_sparse_options_of_an_encoder_need_its_experts(name: str) -> None:
    with pytest.raises(ConfigError, match=r"has no effect with --encoder-num-experts 0 \(a dense encoder\)"):
        sparse({"model.encoder_num_layers": 2, f"encoder_moe.{name}": MOE_VALUES[name]})


EP, NODE = "parallel.expert_model_parallel_size", "parallel.expert_model_parallel_ranks_per_node"
STACKS = ("moe", "encoder_moe")
ENCODER = {"model.encoder_num_layers": 2, "encoder_moe.num_experts": 4}
SPANS = {"model.encoder_num_layers": 2, "data.objective": "span_corruption"}
CAPACITY = {"moe.expert_capacity_factor": 1.0}
SAVE, LOAD = {"checkpoint.save": "runs"}, {"checkpoint.load": "runs"}
WSD = {"optimizer.lr_decay_style": "WSD", "optimizer.lr_wsd_decay_iters": 5}
# what is refused alone, and what makes it count
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"moe.token_drop_policy": "position"}, "without a capacity", CAPACITY),
    (
        {"parallel.overlap_param_gather": False, "parallel.use_distributed_optimizer": False},
        "--no-overlap-param-gather (from the recipe) has no effect when no optimizer is sharded",
        {"parallel.use_distributed_optimizer": True},
    ),
    ({"moe.capacity_includes_k": False}, "--no-moe-capacity-includes-k (from the recipe) has no effect", CAPACITY),
    ({"moe.capacity_rounding": "ceil"}, "without a capacity", CAPACITY),
    ({"moe.min_capacity": 4}, "give --moe-expert-capacity-factor.", CAPACITY),
    ({"moe.slot_priority": "k_major"}, "without a capacity", CAPACITY),
    ({"moe.eval_capacity_factor": 2.0}, "without a capacity", CAPACITY),
    (
        {"moe.shared_expert_gate": True, "moe.shared_expert_overlap": False},
        "--moe-shared-expert-gate (from the recipe) has no effect without a shared expert",
        {"moe.shared_expert_intermediate_size": 64},
    ),
    (
        {EP: 4, NODE: 2, "moe.token_dispatcher_type": "alltoall"},
        "--expert-model-parallel-ranks-per-node 2 (from the recipe) has no effect without a dispatcher that tells "
        "nodes apart; leave it out, or give --moe-token-dispatcher-type hierarchical.",
        {"moe.token_dispatcher_type": "hierarchical"},
    ),
    (
        {EP: 4, NODE: 4},
        "has no effect where one node holds all ranks of --expert-model-parallel-size; leave it out.",
        {NODE: 2},
    ),
    ({NODE: 1}, "where one node holds all ranks", {EP: 2}),
    # one of two stacks is enough
    (
        {**ENCODER, EP: 4, NODE: 2, **{f"{name}.token_dispatcher_type": "allgather" for name in STACKS}},
        "without a dispatcher that tells nodes apart",
        {"encoder_moe.token_dispatcher_type": "auto"},
    ),
    (
        {"model.position_embedding_type": "none", "model.rotary_base": 1e6},
        "--rotary-base 1000000.0 (from the recipe) has no effect without rotary embedding",
        {"model.position_embedding_type": "rope"},
    ),
    (
        {"model.position_embedding_type": "none", "model.rotary_percent": 0.5},
        "without rotary embedding",
        {"model.position_embedding_type": "rope"},
    ),
    (
        {"model.relative_attention_num_buckets": 16},
        "--relative-attention-num-buckets 16 (from the recipe) has no effect without relative positions",
        {"model.position_embedding_type": "relative"},
    ),
    (
        {"model.relative_attention_max_distance": 64},
        "without relative positions",
        {"model.position_embedding_type": "relative"},
    ),
    *[
        ({f"data.{name}": value}, "give --objective span_corruption.", SPANS)
        for name, value in (("noise_density", 0.2), ("mean_noise_span_length", 4.0), ("vocab_extra_ids", 90))
    ],
    *[
        (
            {**SPANS, f"data.{name}": True},
            "with span corruption, which knows no documents",
            {"data.objective": "causal"},
        )
        for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    ],
    (
        {"parallel.tp_comm_overlap": True},
        "--tp-comm-overlap (from the recipe) has no effect with --tensor-model-parallel-size 1",
        {"parallel.tensor_model_parallel_size": 2},
    ),
    (
        {"parallel.cp_comm_type": "p2p"},
        "--cp-comm-type p2p (from the recipe) has no effect when no sequence is cut",
        {"parallel.context_parallel_size": 2},
    ),
    (
        {"parallel.recompute_method": "block"},
        "give --recompute-granularity full.",
        {"parallel.recompute_granularity": "full"},
    ),
    (
        {"parallel.recompute_num_layers": 2},
        "give --recompute-granularity full.",
        {"parallel.recompute_granularity": "full"},
    ),
    (
        {"parallel.recompute_modules": ["core_attn"]},
        "give --recompute-granularity selective.",
        {"parallel.recompute_granularity": "selective"},
    ),
    *[
        (
            {f"parallel.account_for_{end}_in_pipeline_split": True},
            "with one stage, which has all layers",
            {"parallel.pipeline_model_parallel_size": 2},
        )
        for end in ("embedding", "loss")
    ],
    (
        {"parallel.microbatch_group_size_per_virtual_pipeline_stage": 4},
        "with a schedule that does not turn from stage to stage",
        {"parallel.num_virtual_stages_per_pipeline_rank": 2},
    ),
    (
        {**ENCODER, "encoder_moe.min_capacity": 4},
        "give --encoder-moe-expert-capacity-factor.",
        {"encoder_moe.expert_capacity_factor": 1.0},
    ),
    (
        {**ENCODER, "encoder_moe.shared_expert_gate": True},
        "give --encoder-moe-shared-expert-intermediate-size.",
        {"encoder_moe.shared_expert_intermediate_size": 64},
    ),
    (
        {"moe.consistency_cross_entropy": "mean"},
        "has no effect when each sample is seen once",
        {"moe.consistency_coeff": 1.0},
    ),
    ({"optimizer.lr_wsd_decay_style": "linear"}, "use --lr-decay-style WSD.", WSD),
    ({"optimizer.lr_wsd_decay_iters": 5}, "use --lr-decay-style WSD.", WSD),
    (
        {"optimizer.lr_decay_style": "constant", "optimizer.min_lr": 1e-5},
        "with --lr-decay-style constant",
        {"optimizer.lr_decay_style": "cosine"},
    ),
    (
        {"optimizer.lr_decay_style": "constant", "optimizer.lr_decay_iters": 50},
        "with --lr-decay-style constant",
        {"optimizer.lr_decay_style": "linear"},
    ),
    (
        {"parallel.ddp_bucket_size": 1000, "parallel.data_parallel_sharding_strategy": "optim_grads_params"},
        "with --data-parallel-sharding-strategy optim_grads_params, which reduces layer by layer",
        {"parallel.data_parallel_sharding_strategy": "optim"},
    ),
    *[
        (
            {f"parallel.{name}": False, "parallel.data_parallel_sharding_strategy": "optim_grads_params"},
            "with --data-parallel-sharding-strategy optim_grads_params, which reduces layer by layer",
            {"parallel.data_parallel_sharding_strategy": "optim"},
        )
        for name in ("overlap_grad_reduce", "overlap_param_gather")
    ],
    (
        {"parallel.hang_timeout_outside_steps_s": 60.0, "parallel.hang_timeout_s": None},
        "when hangs are not looked for; leave it out, or give --hang-timeout-s",
        {"parallel.hang_timeout_s": 30.0},
    ),
    (
        {"training.nonfinite_action": "skip", "training.check_for_nan_in_loss_and_grad": False},
        "--nonfinite-action skip (from the recipe) has no effect with --no-check-for-nan-in-loss-and-grad",
        {"training.check_for_nan_in_loss_and_grad": True},
    ),
    (
        {"training.max_skipped_steps": 3},
        "when no step is ever skipped; leave it out",
        {"training.nonfinite_action": "skip"},
    ),
    ({"training.spike_window": 64}, "give --spike-sigma.", {"training.spike_sigma": 6.0}),
    ({"training.spike_action": "skip"}, "give --spike-sigma.", {"training.spike_sigma": 6.0}),
    (
        {"training.spike_sigma": 6.0, "training.spike_action": "rewind"},
        "without checkpoints to go back to; leave it out, or give --save and --save-interval",
        {**SAVE, "checkpoint.save_interval": 10},
    ),
    (
        {"training.spike_rewind_steps": 10},
        "give --spike-action rewind.",
        {**SAVE, "checkpoint.save_interval": 10, "training.spike_sigma": 6.0, "training.spike_action": "rewind"},
    ),
    ({"training.eval_iters": 5}, "give --eval-interval.", {"training.eval_interval": 10}),
    (
        {"training.eval_interval": 5, "data.split": "1,0,0"},
        "when --split has no share for validation",
        {"data.split": "9,1,0"},
    ),
    ({"checkpoint.keep": 2}, "without a directory to save to", SAVE),
    ({"checkpoint.async_save": False}, "--no-async-save (from the recipe)", SAVE),
    ({"checkpoint.save_sha256": True}, "--save-sha256 (from the recipe)", SAVE),
    ({"checkpoint.max_restarts_without_progress": 5}, "--max-restarts-without-progress 5 (from the recipe)", SAVE),
    ({"checkpoint.ckpt_step": 5}, "without a directory to load from", LOAD),
    ({"checkpoint.finetune": True}, "without a directory to load from", LOAD),
    ({"checkpoint.strict_resume": True}, "--strict-resume (from the recipe)", LOAD),
    (
        {**LOAD, "checkpoint.strict_resume": True, "checkpoint.ckpt_step": 3},
        "with --ckpt-step, for which no other checkpoint is taken anyway",
        {"checkpoint.ckpt_step": None},
    ),
    ({"checkpoint.no_load_optim": True}, "--no-load-optim (from the recipe)", LOAD),
    ({"checkpoint.exit_on_missing_checkpoint": True}, "without a directory to load from", LOAD),
    (
        {**LOAD, "checkpoint.no_load_optim": True, "checkpoint.finetune": True},
        "with --finetune, which reads the weights only",
        {"checkpoint.finetune": False},
    ),
]


@pytest.mark.parametrize(("idle", "message", "makes_it_count"), CASES)
def test_an_idle_option_is_refused_until_it_counts(
    idle: dict[str, Any], message: str, makes_it_count: dict[str, Any]
) -> None:
    sparse({**idle, **makes_it_count})
    with pytest.raises(ConfigError) as caught:
        sparse(idle)
    assert message in str(caught.value)


def test_every_rule_is_tested_and_names_options_that_exist() -> None:
    tested = {key for case in CASES for key in case[0]} | {f"moe.{name}" for name in MOE_VALUES}
    tested |= {f"encoder_moe.{name}" for name in (*MOE_VALUES, "num_experts")}
    assert {key for rule in RULES for key in rule.keys} <= tested & set(all_settings())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("consistency_coeff", 1.0),
        ("consistency_cross_entropy", "mean"),
        ("aux_layer_reduction", "mean"),
        ("allow_noncausal", True),
    ],
)
def test_what_an_encoder_cannot_have_alone_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="of the whole model|sees all of its text anyway"):
        sparse({**ENCODER, f"encoder_moe.{name}": value})


def test_a_sparse_encoder_beside_a_dense_decoder_has_the_options_of_the_whole_model() -> None:
    assert dense({**ENCODER, "moe.aux_layer_reduction": "mean"}).moe.aux_layer_reduction == "mean"


def test_a_flag_is_refused_as_well_and_says_where_it_came_from() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load([*DENSE_FLAGS, "--moe-router-type", "switch"])
    assert str(caught.value) == f"--moe-router-type switch (from the flag) {DENSE_MODEL}"


def test_defaults_and_switches_left_off_are_nobodys_demand() -> None:
    assert dense().moe.router_topk == 2
    dense({"moe.router_pre_softmax": False, "moe.expert_capacity_factor": None, "moe.router_options": {}})
    dense({"checkpoint.async_save": True, "checkpoint.finetune": False})


def test_a_saved_sparse_run_can_be_made_dense() -> None:
    saved = sparse({"moe.aux_loss_coeff": 0.01}).to_dict()
    saved["moe"]["num_experts"] = 0
    config = RunConfig.from_dict(saved, origin="checkpoint")
    assert config.moe.aux_loss_coeff == 0.01
