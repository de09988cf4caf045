"""Where checkpoints go and come from."""

import os
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import check_values, option

# bytes that Linux's file systems allow in a name, and a path; a checkpoint's own names take up to a hundred below it
LONGEST_NAME, LONGEST_PATH = 255, 3900


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints go and come from."""

    flag_prefix: ClassVar[str] = ""

    save: str | None = option(None, "directory to write checkpoints to; none = none is written")
    load: str | None = option(
        None, "directory to read the newest valid checkpoint from; latest = the directory of --save"
    )
    save_interval: int | None = option(
        None, "steps between checkpoints; none = only at the end and when the run is stopped", at_least=1
    )
    keep: int | None = option(None, "number of newest checkpoints that are kept; none = all", at_least=1)
    async_save: bool = option(True, "write in the background while training goes on")
    strict_resume: bool = option(
        False, "end with exit code 65 when the newest checkpoint is broken, instead of going on from an older one"
    )
    save_sha256: bool = option(
        False,
        "put the SHA-256 of each file of tensors into a checkpoint's manifest too, for other programs; damage is found "
        "without, and on a fast disk it makes saving slower",
    )
    ckpt_step: int | None = option(None, "read the checkpoint of this step, not the newest", at_least=0)
    finetune: bool = option(False, "read the weights only, and start at step 0 with a fresh optimizer")
    no_load_optim: bool = option(False, "read no optimizer state; the step and the data position are kept")
    exit_on_missing_checkpoint: bool = option(
        False, "end with exit code 64 when there is no valid checkpoint, instead of starting afresh"
    )

    max_restarts_without_progress: int | None = option(
        3,
        "attempts in a row that may end without a newer checkpoint; further ones end at once with exit code 93, until "
        "restarts.json in the directory of --save is deleted; none = never",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_values(self)
        for flag, path in (("--save", self.save), ("--load", self.load)):
            _check_length(flag, path)
        if self.save_interval is not None and self.save is None:
            raise ConfigError(f"--save-interval {self.save_interval} needs a directory to save to; give --save.")
        if self.load == "latest" and self.save is None:
            raise ConfigError("--load latest means the directory of --save; give --save, or a directory to --load.")

    @property
    def load_directory(self) -> str | None:
        """The directory to read from, with `latest` resolved; None = start afresh."""
        return self.save if self.load == "latest" else self.load


def _check_length(flag: str, path: str | None) -> None:
    """ConfigError for a path that no file system takes."""
    longest = max((len(os.fsencode(name)) for name in path.split("/")), default=0) if path else 0
    if path and (longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH):
        raise ConfigError(
            f"{flag} {path[:60]}...: names have up to {LONGEST_NAME} bytes and paths up to {LONGEST_PATH}, not "
            f"{longest} and {len(os.fsencode(path))}; give a shorter one."
        )
