"""What a run writes about itself."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.options import check_values, option


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run writes about itself."""

    flag_prefix: ClassVar[str] = ""

    log_interval: int = option(10, "steps between log lines", at_least=1)
    tensorboard_dir: str | None = option(None, "directory for TensorBoard; none = no TensorBoard")
    log_dir: str | None = option(None, "directory for the log as a file; none = the console only")

    def __post_init__(self) -> None:
        check_values(self)
