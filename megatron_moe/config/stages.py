"""How many layers each stage of the pipeline has, and how many stages each rank: what the options say of it."""

from __future__ import annotations

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.stage_layout import FLAG as LAYOUT
from megatron_moe.config.stage_layout import stage_contents

PIPELINE = "--pipeline-model-parallel-size"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
ROUNDS, PER_STAGE = "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage"


def num_rounds(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Stages of each pipeline rank.  Raises ConfigError when the layers do not make whole rounds."""
    ranks = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        number = len(stage_contents(parallel.pipeline_model_parallel_layout))
        if number % ranks:
            raise ConfigError(
                f"{LAYOUT} {parallel.pipeline_model_parallel_layout} has {number} stages, which cannot be shared out "
                f"over {PIPELINE} {ranks}; write a multiple of {ranks}."
            )
        return number // ranks
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        each, units = parallel.num_layers_per_virtual_pipeline_stage, _units(model, parallel)
        if units % (each * ranks):
            raise ConfigError(
                f"{PER_STAGE} {each} on {PIPELINE} {ranks} wants a multiple of {each * ranks} layers, but there are "
                f"{units}, with what the options count as a layer; use another number, or say with {ROUNDS} how many "
                f"stages a rank has, which need not be even."
            )
        return units // (each * ranks)
    return parallel.num_virtual_stages_per_pipeline_rank or 1


def stage_sizes(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Layers of each stage in the order of the model, those of the encoder counted first.

    Stage s stands on pipeline rank s mod ranks.  Raises ConfigError when the layers cannot be shared out so.
    """
    rounds = num_rounds(model, parallel)
    if parallel.pipeline_model_parallel_layout is not None:
        return _sizes_of_layout(parallel.pipeline_model_parallel_layout, model)
    if parallel.decoder_first_pipeline_num_layers or parallel.decoder_last_pipeline_num_layers:
        return _sizes_of_ranks(model, parallel, rounds)
    units, stages = _units(model, parallel), parallel.pipeline_model_parallel_size * rounds
    if units < stages:
        both = f"--encoder-num-layers {model.encoder_num_layers} and " if model.encoder_num_layers else ""
        virtual = f" with {rounds} stages on each rank" if rounds > 1 else ""
        raise ConfigError(
            f"{both}--num-layers {model.num_layers} cannot fill {PIPELINE} "
            f"{parallel.pipeline_model_parallel_size}{virtual}: each stage needs a layer; use {units} stages or fewer."
        )
    sizes = even_sizes(units, stages)
    sizes[0] -= parallel.account_for_embedding_in_pipeline_split
    sizes[-1] -= parallel.account_for_loss_in_pipeline_split
    return sizes


def even_sizes(num_layers: int, num_stages: int) -> list[int]:
    """As even as possible; the middle stages take one more first, since the ends embed and project."""
    quotient, rest = divmod(num_layers, num_stages)
    order = sorted(range(num_stages), key=lambda stage: (stage == num_stages - 1, stage == 0, stage))
    return [quotient + (stage in order[:rest]) for stage in range(num_stages)]


def schedule_name(model: ModelConfig, parallel: ParallelConfig) -> str:
    """What was asked for, or what suits the number of stages a rank has."""
    return parallel.pipeline_schedule or ("interleaved" if num_rounds(model, parallel) > 1 else "1f1b")


def _units(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Layers, and what is counted as one."""
    ends = parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    return model.all_layers + ends


def _sizes_of_layout(text: str, model: ModelConfig) -> list[int]:
    contents = stage_contents(text)
    for letter, flag, wanted in (
        ("e", "--encoder-num-layers", model.encoder_num_layers),
        ("t", "--num-layers", model.num_layers),
    ):
        found = "".join(contents).count(letter)
        if found != wanted:
            raise ConfigError(
                f"{LAYOUT} {text} has {found} times {letter}, but {flag} is {wanted}; make them the same."
            )
    return [stage.count("e") + stage.count("t") for stage in contents]


def _sizes_of_ranks(model: ModelConfig, parallel: ParallelConfig, rounds: int) -> list[int]:
    """The first and the last rank have what was said, those between share the rest evenly."""
    ranks = parallel.pipeline_model_parallel_size
    given = {0: parallel.decoder_first_pipeline_num_layers, ranks - 1: parallel.decoder_last_pipeline_num_layers}
    known = {rank: layers for rank, layers in given.items() if layers is not None}
    rest, others = model.num_layers - sum(known.values()), ranks - len(known)
    said = " and ".join(f"{FIRST if rank == 0 else LAST} {layers}" for rank, layers in known.items())
    if rest < others or (rest and not others) or (others and rest % others):
        raise ConfigError(
            f"{said} would leave {rest} of --num-layers {model.num_layers} to {others} other pipeline ranks, which "
            f"cannot share them evenly; change the numbers, or write each stage out with {LAYOUT}."
        )
    sizes = [known.get(rank, rest // max(1, others)) for rank in range(ranks)]
    for rank, layers in enumerate(sizes):
        if layers % rounds:
            raise ConfigError(
                f"{said} would leave {layers} layers to pipeline rank {rank}, which cannot be cut into {ROUNDS} "
                f"{rounds}; change the numbers, or write each stage out with {LAYOUT}."
            )
    return [layers // rounds for layers in sizes] * rounds
