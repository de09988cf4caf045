"""Options that somebody set and that would change nothing in the run they chose: refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import PLACES
from megatron_moe.config.pipeline import ACCOUNTED
from megatron_moe.config.sections import Sections, all_settings
from megatron_moe.config.stages import schedule_name, stage_sizes
from megatron_moe.config.values import written

# Only these were set by a person who can take them back; a saved configuration holds values of every kind of run.
SET_BY_SOMEBODY = ("recipe", "flag")


@dataclass(frozen=True)
class Rule:
    """The options `keys` change nothing when `idle` holds."""

    keys: tuple[str, ...]
    idle: Callable[[Sections], bool]
    because: str


CAPACITY = tuple(f"moe.{name}" for name in PLACES)
ENCODER_CAPACITY = tuple(f"encoder_moe.{name}" for name in PLACES)
RELATIVE = ("model.relative_attention_num_buckets", "model.relative_attention_max_distance")
OF_THE_WHOLE_MODEL = ("moe.consistency_coeff", "moe.consistency_cross_entropy", "moe.aux_layer_reduction")
WSD = ("optimizer.lr_wsd_decay_iters", "optimizer.lr_wsd_decay_style")
SPANS = ("data.noise_density", "data.mean_noise_span_length", "data.vocab_extra_ids")
DECAY = ("optimizer.min_lr", "optimizer.lr_decay_iters")
ROTARY = ("model.rotary_base", "model.rotary_percent")
SAVING = ("keep", "async_save", "save_sha256", "max_restarts_without_progress")
LOADING = ("ckpt_step", "strict_resume", "finetune", "no_load_optim", "exit_on_missing_checkpoint")
NODES = ("parallel.expert_model_parallel_ranks_per_node",)


def _dispatchers(run: Sections) -> set[str]:
    """What the sparse layers of all stacks ask for; none in a dense model."""
    return {moe.token_dispatcher_type for moe, _ in run.stacks if moe.num_experts}


RULES = (
    Rule(
        tuple(
            key
            for key in all_settings()
            if key.startswith("moe.") and key != "moe.num_experts" and key not in OF_THE_WHOLE_MODEL
        ),
        lambda run: run.moe.num_experts == 0,
        "with --num-experts 0 (a dense model); leave it out, or give --num-experts",
    ),
    Rule(
        OF_THE_WHOLE_MODEL,
        lambda run: not any(moe.num_experts for moe, _ in run.stacks),
        "with --num-experts 0 (a dense model); leave it out, or give --num-experts",
    ),
    Rule(
        CAPACITY,
        lambda run: run.moe.expert_capacity_factor is None,
        "without a capacity, for no token is ever dropped; leave it out, or give --moe-expert-capacity-factor",
    ),
    Rule(
        tuple(key for key in all_settings() if key.startswith("encoder_moe.")),
        lambda run: run.model.encoder_num_layers == 0,
        "without an encoder; leave it out, or give --encoder-num-layers",
    ),
    Rule(
        tuple(key for key in all_settings() if key.startswith("encoder_moe.") and key != "encoder_moe.num_experts"),
        lambda run: run.encoder_moe.num_experts == 0,
        "with --encoder-num-experts 0 (a dense encoder); leave it out, or give --encoder-num-experts",
    ),
    Rule(
        tuple(f"encoder_{key}" for key in OF_THE_WHOLE_MODEL),
        lambda run: True,
        "on one stack alone: it is of the whole model; leave it out, or give it without encoder-",
    ),
    Rule(
        ENCODER_CAPACITY,
        lambda run: run.encoder_moe.expert_capacity_factor is None,
        "without a capacity, for no token is ever dropped; leave it out, or give --encoder-moe-expert-capacity-factor",
    ),
    Rule(
        ("encoder_moe.shared_expert_gate", "encoder_moe.shared_expert_overlap"),
        lambda run: run.encoder_moe.shared_expert_intermediate_size is None,
        "without a shared expert; leave it out, or give --encoder-moe-shared-expert-intermediate-size",
    ),
    Rule(
        ("encoder_moe.allow_noncausal",),
        lambda run: True,
        "in an encoder, which sees all of its text anyway; leave it out",
    ),
    Rule(
        ("moe.shared_expert_gate", "moe.shared_expert_overlap"),
        lambda run: run.moe.shared_expert_intermediate_size is None,
        "without a shared expert; leave it out, or give --moe-shared-expert-intermediate-size",
    ),
    Rule(
        NODES,
        lambda run: not (_dispatchers(run) & {"auto", "hierarchical"}),
        "without a dispatcher that tells nodes apart; leave it out, or give --moe-token-dispatcher-type hierarchical",
    ),
    Rule(
        NODES,
        lambda run: (
            run.parallel.expert_model_parallel_ranks_per_node == run.parallel.expert_model_parallel_size
            and "hierarchical" not in _dispatchers(run)
        ),
        "where one node holds all ranks of --expert-model-parallel-size; leave it out",
    ),
    Rule(
        ("moe.consistency_cross_entropy",),
        lambda run: run.moe.consistency_coeff is None,
        "when each sample is seen once; leave it out, or give --moe-consistency-coeff",
    ),
    Rule(
        ROTARY,
        lambda run: run.model.position_embedding_type != "rope",
        "without rotary embedding; leave it out, or use --position-embedding-type rope",
    ),
    Rule(
        ("parallel.tp_comm_overlap",),
        lambda run: run.parallel.tensor_model_parallel_size == 1,
        "with --tensor-model-parallel-size 1, where nothing travels; leave it out, or raise the tensor size",
    ),
    Rule(
        ("parallel.cp_comm_type",),
        lambda run: run.parallel.context_parallel_size == 1,
        "when no sequence is cut; leave it out, or give --context-parallel-size",
    ),
    Rule(
        ("parallel.recompute_method", "parallel.recompute_num_layers"),
        lambda run: run.parallel.recompute_granularity != "full",
        "without recomputation of whole layers; leave it out, or give --recompute-granularity full",
    ),
    Rule(
        ("parallel.recompute_modules",),
        lambda run: run.parallel.recompute_granularity != "selective",
        "without selective recomputation; leave it out, or give --recompute-granularity selective",
    ),
    Rule(
        ("parallel.overlap_param_gather",),
        lambda run: not run.parallel.shards_optimizer,
        "when no optimizer is sharded, for every rank updates all weights itself; leave it out",
    ),
    Rule(
        tuple(f"parallel.{name}" for name in ACCOUNTED),
        lambda run: len(stage_sizes(run.model, run.parallel)) == 1,
        "with one stage, which has all layers; leave it out, or use a larger --pipeline-model-parallel-size",
    ),
    Rule(
        ("parallel.microbatch_group_size_per_virtual_pipeline_stage",),
        lambda run: schedule_name(run.model, run.parallel) != "interleaved",
        "with a schedule that does not turn from stage to stage; leave it out, or give a rank several stages with "
        "--num-virtual-stages-per-pipeline-rank",
    ),
    Rule(
        ("parallel.hang_timeout_outside_steps_s",),
        lambda run: run.parallel.hang_timeout_s is None,
        "when hangs are not looked for; leave it out, or give --hang-timeout-s",
    ),
    Rule(
        RELATIVE,
        lambda run: run.model.position_embedding_type != "relative",
        "without relative positions; leave it out, or use --position-embedding-type relative",
    ),
    Rule(
        SPANS,
        lambda run: run.data.objective != "span_corruption",
        "without span corruption; leave it out, or give --objective span_corruption",
    ),
    Rule(
        ("data.reset_position_ids", "data.reset_attention_mask", "data.eod_mask_loss"),
        lambda run: run.data.objective == "span_corruption",
        "with span corruption, which knows no documents; leave it out",
    ),
    Rule(
        ("parallel.ddp_bucket_size", "parallel.overlap_grad_reduce", "parallel.overlap_param_gather"),
        lambda run: run.parallel.shards_parameters,
        "with --data-parallel-sharding-strategy optim_grads_params, which reduces layer by layer; leave it out",
    ),
    Rule(
        WSD,
        lambda run: run.optimizer.lr_decay_style != "WSD",
        "without the WSD schedule; leave it out, or use --lr-decay-style WSD",
    ),
    Rule(
        DECAY,
        lambda run: run.optimizer.lr_decay_style == "constant",
        "with --lr-decay-style constant; leave it out, or use another style",
    ),
    Rule(
        ("training.nonfinite_action",),
        lambda run: not run.training.check_for_nan_in_loss_and_grad,
        "with --no-check-for-nan-in-loss-and-grad, which looks for no such numbers; leave one of them out",
    ),
    Rule(
        ("training.max_skipped_steps",),
        lambda run: run.training.nonfinite_action == "stop" and run.training.spike_sigma is None,
        "when no step is ever skipped; leave it out, or give --nonfinite-action skip or --spike-sigma",
    ),
    Rule(
        ("training.spike_window", "training.spike_action"),
        lambda run: run.training.spike_sigma is None,
        "when spikes are not looked for; leave it out, or give --spike-sigma",
    ),
    Rule(
        ("training.spike_action",),
        lambda run: run.training.spike_action == "rewind" and run.checkpoint.save_interval is None,
        "without checkpoints to go back to; leave it out, or give --save and --save-interval",
    ),
    Rule(
        ("training.spike_rewind_steps",),
        lambda run: run.training.spike_action == "skip",
        "when no spike leads back to a checkpoint; leave it out, or give --spike-action rewind",
    ),
    Rule(
        ("training.eval_iters",),
        lambda run: run.training.eval_interval is None,
        "without evaluation; leave it out, or give --eval-interval",
    ),
    Rule(
        ("training.eval_interval",),
        lambda run: run.data.split_fractions[1] == 0,
        "when --split has no share for validation; leave it out, or use a split such as 969,30,1",
    ),
    Rule(
        tuple(f"checkpoint.{name}" for name in SAVING),
        lambda run: run.checkpoint.save is None,
        "without a directory to save to; leave it out, or give --save",
    ),
    Rule(
        tuple(f"checkpoint.{name}" for name in LOADING),
        lambda run: run.checkpoint.load is None,
        "without a directory to load from; leave it out, or give --load",
    ),
    Rule(
        ("checkpoint.strict_resume",),
        lambda run: run.checkpoint.ckpt_step is not None,
        "with --ckpt-step, for which no other checkpoint is taken anyway; leave it out",
    ),
    Rule(
        ("checkpoint.no_load_optim",),
        lambda run: run.checkpoint.finetune,
        "with --finetune, which reads the weights only; leave it out",
    ),
)


def refuse_no_effect(run: Sections, origins: Mapping[str, str]) -> None:
    """Raise ConfigError for the first option that a recipe or a flag set without any effect.

    A switch set to its default, and an option set to none, ask for nothing and stay allowed.
    """
    for rule in RULES:
        if not rule.idle(run):
            continue
        for key in rule.keys:
            if origins.get(key) in SET_BY_SOMEBODY and _demands(run, key):
                raise ConfigError(f"{_as_flag(run, key)} (from the {origins[key]}) has no effect {rule.because}.")


def _demands(run: Sections, key: str) -> bool:
    """Whether the value asks for something: a switch at its default and an option unset do not."""
    setting, value = all_settings()[key], _value(run, key)
    if value is None or value == {}:
        return False
    return setting.kind is not bool or value != setting.default


def _as_flag(run: Sections, key: str) -> str:
    """The option as it would stand on the command line."""
    setting, value = all_settings()[key], _value(run, key)
    if isinstance(value, bool):
        return setting.flag if value else setting.negative_flag
    return f"{setting.flag} {value if isinstance(value, str) else written(value)}"


def _value(run: Sections, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(run, section), name)
