"""Which numbers the model computes in."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.options import check_values, option


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Which numbers the model computes in; routers, losses and master weights are always at least float32."""

    flag_prefix: ClassVar[str] = ""

    dtype: str = option(
        "fp32",
        "type of weights and activations in forward and backward; fp64 serves parity tests",
        choices=("fp32", "bf16", "fp64"),
        shortcuts={"--bf16": "bf16"},
    )

    def __post_init__(self) -> None:
        check_values(self)
