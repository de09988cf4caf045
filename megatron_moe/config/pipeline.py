"""What the options of the pipeline demand of each other and of the model."""

from __future__ import annotations

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import settings_of
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.sections import Sections
from megatron_moe.config.stages import FIRST, LAST, PER_STAGE, PIPELINE, ROUNDS, num_rounds, schedule_name, stage_sizes

ACCOUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
OF_RANKS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
# an option, and those that say the same in another way
RIVALS = {
    "pipeline_model_parallel_layout": (*VIRTUAL, *OF_RANKS, *ACCOUNTED),
    "num_virtual_stages_per_pipeline_rank": ("num_layers_per_virtual_pipeline_stage",),
    "decoder_first_pipeline_num_layers": ("num_layers_per_virtual_pipeline_stage", *ACCOUNTED),
    "decoder_last_pipeline_num_layers": ("num_layers_per_virtual_pipeline_stage", *ACCOUNTED),
}
# what plays several stages on a rank
FOR_ROUNDS = ("interleaved", "sequential")


def check_pipeline(run: Sections) -> None:
    """Raises ConfigError for the first demand that is not met."""
    _rivals(run.parallel)
    _of_ranks(run)
    stage_sizes(run.model, run.parallel)
    _schedule(run)


def _rivals(parallel: ParallelConfig) -> None:
    flags = {name: setting.flag for name, setting in settings_of(ParallelConfig).items()}
    for name, others in RIVALS.items():
        for other in others:
            if getattr(parallel, name) and getattr(parallel, other):
                raise ConfigError(
                    f"{flags[name]} and {flags[other]} both say which stage has which layers; leave one of them out."
                )


def _of_ranks(run: Sections) -> None:
    parallel = run.parallel
    first, last = (getattr(parallel, name) for name in OF_RANKS)
    if first is None and last is None:
        return
    flag = FIRST if first is not None else LAST
    if parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            f"{flag} {first or last} has no effect with {PIPELINE} 1, where one rank has all layers; leave it out."
        )
    if run.model.encoder_num_layers:
        raise ConfigError(
            f"{flag} {first or last} does not say which layers of the encoder are meant; write each stage out with "
            f"--pipeline-model-parallel-layout."
        )


def _schedule(run: Sections) -> None:
    parallel = run.parallel
    rounds, name = num_rounds(run.model, parallel), schedule_name(run.model, parallel)
    if rounds > 1 and name not in FOR_ROUNDS:
        raise ConfigError(
            f"--pipeline-schedule {name} plays one stage on each rank, but the options make {rounds}; use "
            f"{' or '.join(FOR_ROUNDS)}, or leave out {ROUNDS}, {PER_STAGE} or a longer layout."
        )
    if rounds == 1 and name == "interleaved":
        raise ConfigError(
            f"--pipeline-schedule interleaved plays several stages on each rank, but the options make one; give "
            f"{ROUNDS} 2 or more, or use 1f1b."
        )
    if name == "1f1b_overlap" and parallel.expert_model_parallel_size == 1:
        raise ConfigError(
            "--pipeline-schedule 1f1b_overlap hides what travels between the ranks of experts, but "
            "--expert-model-parallel-size 1 lets nothing travel; use 1f1b, or a larger expert size."
        )
    group, ranks = parallel.microbatch_group_size_per_virtual_pipeline_stage, parallel.pipeline_model_parallel_size
    if group is not None and group < ranks:
        raise ConfigError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group} is less than {PIPELINE} {ranks}, so that "
            f"ranks would wait for each other; use {ranks} or more."
        )
