"""The optimizer and its learning rate over time."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import REQUIRED, check_values, option


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate over time."""

    flag_prefix: ClassVar[str] = ""

    optimizer: str = option("adamw", "Adam with decoupled weight decay", choices=("adamw",))
    lr: float = option(REQUIRED, "learning rate at its peak", above=0)
    min_lr: float = option(0.0, "learning rate below which the decay does not go", at_least=0)
    lr_decay_style: str = option(
        "cosine",
        "shape of the decay; WSD = warm-up, stable, decay",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = option(
        None, "step at which the decay ends, warm-up included; none = the whole run", at_least=1
    )
    lr_warmup_iters: int = option(0, "steps of linear warm-up from 0", at_least=0)
    lr_wsd_decay_iters: int | None = option(None, "steps of the last phase of WSD", at_least=1)
    lr_wsd_decay_style: str = option(
        "exponential",
        "shape of the last phase of WSD",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    weight_decay: float = option(0.01, "decoupled weight decay; 0.1 in OLMoE", at_least=0)
    adam_beta1: float = option(0.9, "decay of the gradient's running mean", at_least=0, below=1)
    adam_beta2: float = option(0.95, "decay of its running square; 0.95 in GPT-3 and OLMoE", at_least=0, below=1)
    adam_eps: float = option(1e-8, "added to the root of the running square", above=0)
    clip_grad: float = option(1.0, "largest norm of the whole model's gradient; 0 = no clipping", at_least=0)

    def __post_init__(self) -> None:
        check_values(self)
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr:g} is above the peak, --lr {self.lr:g}; use a smaller one.")
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            raise ConfigError("--lr-decay-style WSD needs --lr-wsd-decay-iters, the steps of its last phase; give it.")

    def decay_steps(self, num_steps: int) -> int:
        """The step at which the decay ends, in a run of so many steps."""
        return self.lr_decay_iters or num_steps
