"""What a number of ranks demands: checked by every launcher, tool and test that knows how many there are."""

from __future__ import annotations

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.relations import divisors, words
from megatron_moe.config.sections import Sections


def check_world(run: Sections, world_size: int) -> None:
    """Raise ConfigError, listing what would be legal, unless the run can be laid out over so many ranks."""
    _dense_grid(run, world_size)
    _expert_grid(run, world_size)
    _batch(run, world_size)
    if world_size == 1 and run.parallel.debug_collectives:
        raise ConfigError("--debug-collectives has no effect with one rank, which talks to nobody; leave it out.")


def _dense_grid(run: Sections, world_size: int) -> None:
    parallel = run.parallel
    size = parallel.model_parallel_size
    if world_size >= 1 and world_size % size == 0:
        return
    above = max(1, -(-world_size // size)) * size
    fewer = f", sizes whose product is {words(divisors(world_size))}" if world_size >= 1 else ""
    raise ConfigError(
        f"{world_size} ranks cannot be shared out over --tensor-model-parallel-size "
        f"{parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
        f"{parallel.pipeline_model_parallel_size} x --context-parallel-size {parallel.context_parallel_size} = {size}; "
        f"use a multiple of {size} ranks, such as {above}{', or' + fewer[1:] if fewer else ''}."
    )


def _expert_grid(run: Sections, world_size: int) -> None:
    parallel, num_experts = run.parallel, run.moe.num_experts
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor
    stage = world_size // parallel.pipeline_model_parallel_size
    if stage % (ep * etp) == 0:
        return
    if stage % etp:
        way_out = f"use an expert tensor size of {words(divisors(stage))}, or a multiple of {ep * etp} ranks per stage"
    else:
        legal = [size for size in divisors(stage // etp) if num_experts % size == 0]
        way_out = f"use an expert size of {words(legal)}, or a multiple of {ep * etp} ranks per stage"
    raise ConfigError(
        f"the {stage} ranks of a pipeline stage cannot be shared out over --expert-model-parallel-size {ep} x "
        f"--expert-tensor-parallel-size {etp} = {ep * etp}; {way_out}."
    )


def _batch(run: Sections, world_size: int) -> None:
    total, micro = run.training.global_batch_size, run.training.micro_batch_size
    copies = run.parallel.data_parallel_size(world_size)
    portion = micro * copies
    if total % portion == 0:
        return
    below, above = total // portion * portion, -(-total // portion) * portion
    legal = [f"--global-batch-size {words(size for size in (below, above) if size)}"]
    samples = run.moe.routing_group_samples if run.moe.num_experts else 1
    if total % copies == 0:
        sizes = [size for size in divisors(total // copies) if size % samples == 0]
        if sizes:
            legal.append(f"--micro-batch-size {words(sizes)}")
    raise ConfigError(
        f"--global-batch-size {total} is no multiple of --micro-batch-size {micro} x {copies} data-parallel ranks = "
        f"{portion}; use {', or '.join(legal)}."
    )
