"""The sparse layers of an encoder: the same options as the decoder's, with values of their own."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option


@dataclass(frozen=True, kw_only=True)
class EncoderMoEConfig(MoEConfig):
    """The sparse feed-forward layers of the encoder; nothing is taken over from those of the decoder."""

    flag_prefix: ClassVar[str] = "encoder-moe-"
    layers_flag: ClassVar[str] = "--encoder-num-layers"

    num_experts: int = option(
        0, "experts in an MoE layer of the encoder; 0 = dense encoder", flag="--encoder-num-experts", at_least=0
    )
