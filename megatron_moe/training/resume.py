"""Where a run goes on, and what must not change between its halves, or it would not be one run."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.load import CheckpointReader, DamagedError, find_checkpoint
from megatron_moe.checkpoint.messages import told_by_first
from megatron_moe.checkpoint.rotate import stored_steps
from megatron_moe.config.checkpoint import CheckpointConfig
from megatron_moe.config.errors import ConfigError, NoCheckpointError, StorageError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sections import all_settings
from megatron_moe.config.values import written
from megatron_moe.moe.methods import find_method
from megatron_moe.moe.routers.options import parse_options
from megatron_moe.parallel.state import Axis

logger = logging.getLogger(__name__)

WAY_OUT = "Give this run the same, or start a new run from its weights with --finetune."


def go_on(
    wanted: CheckpointConfig, world: Axis, device: torch.device, fill: Callable[[CheckpointReader], None]
) -> None:
    """Fill a run from the newest whole checkpoint; not at all when it starts at step 0. Collective.

    Each byte is read once and verified on its way: when that finds damage, the next older one fills all anew.
    Raises NoCheckpointError when one was required, and when there are some but none is whole; CheckpointError when the
    step that was asked for is not, or with --strict-resume the newest.
    """
    fill_from_newest(lambda damaged: _find_start(wanted, world, device, damaged), fill)


def fill_from_newest(
    find: Callable[[Mapping[int, str]], CheckpointReader | None], fill: Callable[[CheckpointReader], None]
) -> None:
    """Fill from what `find` finds, told which steps proved damaged and why, until one is whole. Collective."""
    damaged: dict[int, str] = {}
    while (reader := find(damaged)) is not None:
        try:
            fill(reader)
        except DamagedError as error:
            damaged[reader.step] = str(error)
        else:
            reader.tell_passed_over()
            return


def _find_start(
    wanted: CheckpointConfig, world: Axis, device: torch.device, damaged: Mapping[int, str]
) -> CheckpointReader | None:
    if wanted.load_directory is None:
        return None
    folder = Path(wanted.load_directory)
    try:
        return find_checkpoint(
            folder,
            wanted.ckpt_step,
            world,
            strict=wanted.strict_resume,
            check="on_read",
            device=device,
            damaged=damaged,
        )
    except NoCheckpointError as error:
        if wanted.exit_on_missing_checkpoint or wanted.ckpt_step is not None:
            raise
        if told_by_first("some" if stored_steps(folder) else "", world, device):
            # a run that has checkpoints must not start afresh beside them
            raise NoCheckpointError(f"{error}\nRepair them; to start at step 0, move them away.") from error
        logger.warning("no checkpoint in %s: starting at step 0", folder)
        return None


def check_place_to_save(wanted: CheckpointConfig, step: int) -> None:
    """Before the first step, not after hours: --save can be written to, and holds no other run's later steps.

    step: finished ones of this run.  Raises StorageError or ConfigError.
    """
    if wanted.save is None:
        return
    existing = Path(wanted.save)
    while not os.path.lexists(existing):
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise StorageError(
            f"--save {wanted.save}: {existing} is no directory that this process may write to. Name one that is."
        )
    if wanted.load_directory == wanted.save and wanted.ckpt_step is None and not wanted.finetune:
        return  # what is later there was passed over as broken
    later = [found for found in stored_steps(Path(wanted.save)) if found > step]
    if later:
        raise ConfigError(
            f"--save {wanted.save} holds a checkpoint of step {later[0]} already, and this run is at step {step}: "
            f"the two would be mixed. Give another directory, or --load latest to go on there."
        )


def check_same_run(reader: CheckpointReader, now: RunConfig) -> list[str]:
    """Raises ConfigError with every option that makes another model, or another order of samples, than was saved.

    Returns the other options that bear on the run and are not as they were: what is given now holds, and is to be told.
    """
    saved = RunConfig.from_json(reader.config_json, source=f"config.json of {reader.folder}")
    before, after = _resolved(saved), _resolved(now)
    changed = _differences(before, after)
    if changed:
        raise ConfigError(f"the run in {reader.folder} is another one: {'; '.join(changed)}. {WAY_OUT}")
    return _differences(_free(saved, before), _free(now, after))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{all_settings()[key].flag} was {written(before[key])} and is {written(after[key])}"
        for key in before
        if key in after and before[key] != after[key]
    ]


def _free(run: RunConfig, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The options that may change, without those that only say where files are and when to write them."""
    values = run.to_dict()
    return {
        key: values[section][name]
        for key in all_settings()
        for section, _, name in [key.partition(".")]
        if key not in fixed and section not in ("checkpoint", "logging")
    }


def check_same_data(reader: CheckpointReader, now: Mapping[str, str]) -> None:
    """Raises ConfigError, with both fingerprints, if tokenizer, corpus or its tokens are not those that were saved."""
    changed = [
        f"another {name} (its fingerprint was {reader.data[name]} and is {value})"
        for name, value in now.items()
        if reader.data.get(name, value) != value
    ]
    if changed:
        raise ConfigError(f"the run in {reader.folder} was started with {' and '.join(changed)}. {WAY_OUT}")


def _resolved(run: RunConfig) -> dict[str, Any]:
    """The values that the model's function and the order of samples follow from, however they were written."""
    model, data = run.model, run.data
    values: dict[str, Any] = {
        "model.num_layers": model.num_layers,
        "model.encoder_num_layers": model.encoder_num_layers,
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.groups,
        "model.kv_channels": model.head_dim,
        "model.position_embedding_type": model.position_embedding_type,
        "model.relative_attention_num_buckets": model.relative_attention_num_buckets,
        "model.relative_attention_max_distance": model.relative_attention_max_distance,
        "model.rotary_base": model.rotary_base,
        "model.rotary_percent": model.rotary_percent,
        "model.normalization": model.normalization,
        "model.norm_epsilon": model.norm_epsilon,
        "model.activation": model.activation,
        "model.qk_layernorm": model.qk_layernorm,
        "model.untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "data.seq_length": data.seq_length,
        "data.objective": data.objective,
        "data.split": data.split_fractions,
        "data.data_path": data.weights,
        "training.seed": run.training.seed,
    }
    if data.objective == "span_corruption":
        names = ("noise_density", "mean_noise_span_length", "vocab_extra_ids")
        values |= {f"data.{name}": getattr(data, name) for name in names}
    for section, (moe, layers) in zip(("moe", "encoder_moe"), reversed(run.stacks), strict=False):
        values |= {f"{section}.{name}": value for name, value in _stack(moe, layers, model).items()}
    return values


def _stack(moe: MoEConfig, layers: int, model: ModelConfig) -> dict[str, Any]:
    """The same of the sparse layers of a stack."""
    if not moe.num_experts:
        return {"num_experts": 0}
    return {
        "num_experts": moe.num_experts,
        "layer_freq": moe.moe_layers(layers),
        "ffn_hidden_size": moe.expert_ffn_size(model.ffn_size),
        "router_type": moe.router_type,
        "router_topk": moe.router_topk,
        "router_pre_softmax": moe.router_pre_softmax,
        "router_options": _router_options(moe),
        "shared_expert_intermediate_size": moe.shared_expert_intermediate_size,
        "shared_expert_gate": moe.shared_expert_gate,
        "routing_group_samples": moe.routing_group_samples,
        "activation": moe.activation or model.activation,
        "expert_bias": moe.expert_bias,
        "extra_ffn": moe.extra_ffn,
    }


def _router_options(moe: MoEConfig) -> dict[str, Any]:
    """All of the router's own, but for weights of losses: they are another objective, not another model."""
    options = asdict(parse_options(find_method(moe.router_type).Options, moe))
    return {name: value for name, value in options.items() if not name.endswith("_coeff")}
