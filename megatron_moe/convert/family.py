"""What a Hugging Face model family has to say to be converted: its tensors, its config.json, and its limits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping as TableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.convert.mapping import Mapping


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All that names, shapes and config.json depend on; V is the vocabulary without padding."""

    model: ModelConfig
    moe: MoEConfig
    vocab_size: int

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the project's embedding."""
        return self.model.padded_vocab_size(self.vocab_size)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Global indices of the MoE layers."""
        return tuple(i for i, sparse in enumerate(self.moe.moe_layers(self.model.num_layers)) if sparse)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Global indices of the layers with an ordinary feed-forward."""
        return tuple(i for i, sparse in enumerate(self.moe.moe_layers(self.model.num_layers)) if not sparse)

    @property
    def expert_size(self) -> int:
        """Inner width F of one expert."""
        return self.moe.expert_ffn_size(self.model.ffn_size)


@dataclass(frozen=True)
class ExpertNames:
    """Names of the sparse layer's tensors on disk, with {layer} and {expert}; the fused files' are the same for all."""

    router: str
    gate: str
    up: str
    down: str


class Family(ABC):
    """One model family: everything that the converter has to know of it. It has no state."""

    model_type: ClassVar[str]  # of config.json
    architecture: ClassVar[str]  # the class in transformers
    expert_names: ClassVar[ExpertNames]

    @abstractmethod
    def obstacles(self, shape: ModelShape) -> list[str]:
        """Why the family cannot express the model: one sentence each, with the way out; empty when it can."""

    @abstractmethod
    def config_keys(self, shape: ModelShape) -> dict[str, Any]:
        """The keys of config.json that describe the model. Counts are ints, coefficients floats (5.x checks)."""

    @abstractmethod
    def read_config(self, config: TableMapping[str, Any]) -> ModelShape:
        """The model that a config.json describes; ConfigError names the key that the project cannot express."""

    @abstractmethod
    def mapping(self, shape: ModelShape) -> Mapping:
        """All tensors of the model, ours and theirs."""
