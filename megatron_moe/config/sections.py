"""The sections of a run, and every option by its key: "moe.router_topk" is router_topk in the table [moe]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import get_type_hints

from megatron_moe.config.checkpoint import CheckpointConfig
from megatron_moe.config.data import DataConfig
from megatron_moe.config.encoder_moe import EncoderMoEConfig
from megatron_moe.config.logging import LoggingConfig
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.config.options import Setting, settings_of
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.precision import PrecisionConfig
from megatron_moe.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Sections:
    """The sections of a run; each is a table of a recipe and a group of `--help`."""

    model: ModelConfig
    moe: MoEConfig
    encoder_moe: EncoderMoEConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig

    @property
    def stacks(self) -> tuple[tuple[MoEConfig, int], ...]:
        """The sparse options and the number of layers of the encoder, if there is one, and of the decoder."""
        encoder = ((self.encoder_moe, self.model.encoder_num_layers),) if self.model.encoder_num_layers else ()
        return (*encoder, (self.moe, self.model.num_layers))


@cache
def section_types() -> Mapping[str, type]:
    """The class of each section by its name, in order."""
    hints = get_type_hints(Sections)
    return {field.name: hints[field.name] for field in fields(Sections)}


@cache
def all_settings() -> Mapping[str, Setting]:
    """Every option of every section by its key, in order."""
    return {
        f"{section}.{name}": setting
        for section, section_type in section_types().items()
        for name, setting in settings_of(section_type).items()
    }
