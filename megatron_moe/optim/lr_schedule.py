"""The learning rate as a pure function of the step: a linear warm-up from 0, then one of these shapes down to min_lr.

    constant               stays at lr
    linear, cosine         from the end of the warm-up to --lr-decay-iters, then min_lr
    inverse-square-root    lr · √(warm-up / step)
    WSD                    stays at lr, and goes down in the last --lr-wsd-decay-iters before --lr-decay-iters

The formulas are Megatron-LM's (core/optimizer_param_scheduler.py).
"""

import math
from collections.abc import Callable

from megatron_moe.config.optimizer import OptimizerConfig

# share of the way (0..1) → share of lr - min_lr that is left
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda way: 1.0 - way,
    "cosine": lambda way: 0.5 * (math.cos(math.pi * way) + 1.0),
    "exponential": lambda way: 2.0 * math.pow(0.5, way) - 1.0,
    "minus_sqrt": lambda way: 1.0 - math.sqrt(way),
}


def learning_rate(config: OptimizerConfig, step: int, train_iters: int) -> float:
    """The rate of the update that follows `step` finished ones, in a run of `train_iters`.

    So the first update has step 0 and, under a warm-up, the rate 0; the one after the last warm-up step has lr. This is
    how Megatron-LM counts.
    """
    warmup, end = config.lr_warmup_iters, config.decay_steps(train_iters)
    if warmup > 0 and step <= warmup:
        return config.lr * step / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if step > end:
        return config.min_lr
    if config.lr_decay_style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(step, 1)))
    return config.min_lr + _share_left(config, step, end) * (config.lr - config.min_lr)


def _share_left(config: OptimizerConfig, step: int, end: int) -> float:
    """How much of lr - min_lr is left at a step between the warm-up and the end of the decay."""
    style, start = config.lr_decay_style, config.lr_warmup_iters
    if style == "WSD":
        style, start = config.lr_wsd_decay_style, end - (config.lr_wsd_decay_iters or 0)
        if step <= start:
            return 1.0
    return _SHAPES[style]((step - start) / (end - start))
