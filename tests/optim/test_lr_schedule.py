"""Schedules against numbers worked out by hand, and against Megatron's own scheduler where it is installed."""

import itertools
import math
import warnings
from types import SimpleNamespace

import pytest

from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.optim.lr_schedule import learning_rate

STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")


def config(style: str, **options: object) -> OptimizerConfig:
    given = {"lr": 1.0, "min_lr": 0.1, "lr_warmup_iters": 4, "lr_decay_style": style} | options
    return OptimizerConfig(**given)  # type: ignore[arg-type]


# warm-up 4, end 20, rate 1 down to 0.1; the last phase of WSD takes 8
@pytest.mark.parametrize(
    ("style", "step", "want"),
    [
        *[(style, 0, 0.0) for style in STYLES],
        *[(style, 1, 0.25) for style in STYLES],
        *[(style, 4, 1.0) for style in STYLES],
        *[(style, 21, 0.1) for style in STYLES if style != "constant"],
        ("constant", 12, 1.0),
        ("constant", 21, 1.0),
        ("linear", 8, 0.775),
        ("linear", 12, 0.55),
        ("linear", 20, 0.1),
        ("cosine", 8, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        ("cosine", 12, 0.55),
        ("cosine", 20, 0.1),
        ("inverse-square-root", 9, 2 / 3),
        ("inverse-square-root", 16, 0.5),
        ("WSD", 12, 1.0),
        ("WSD", 20, 0.1),
    ],
)
def test_hand_made_values(style: str, step: int, want: float) -> None:
    assert learning_rate(config(style, lr_wsd_decay_iters=8), step, train_iters=20) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "left"),
    [("linear", 0.75), ("cosine", (1 + math.sqrt(0.5)) / 2), ("exponential", 2 * 0.5**0.25 - 1), ("minus_sqrt", 0.5)],
)
def test_a_quarter_into_the_last_phase_of_wsd(shape: str, left: float) -> None:
    chosen = config("WSD", lr_wsd_decay_iters=8, lr_wsd_decay_style=shape)
    assert learning_rate(chosen, 14, train_iters=20) == pytest.approx(0.1 + 0.9 * left, rel=1e-12)


def test_the_decay_ends_where_it_is_told_and_else_with_the_run() -> None:
    assert learning_rate(config("linear", lr_decay_iters=12), 8, train_iters=20) == pytest.approx(0.55)
    assert learning_rate(config("linear", lr_decay_iters=12), 13, train_iters=20) == 0.1
    assert learning_rate(config("linear"), 8, train_iters=12) == pytest.approx(0.55)


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    for style in STYLES:
        assert learning_rate(config(style, lr_warmup_iters=0, lr_wsd_decay_iters=8), 0, train_iters=20) == 1.0


def test_the_inverse_root_does_not_fall_below_the_minimum() -> None:
    assert learning_rate(config("inverse-square-root", min_lr=0.6), 16, train_iters=20) == 0.6


@pytest.mark.slow
def test_every_step_equals_megatrons_scheduler() -> None:
    pytest.importorskip("megatron.core")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of missing accelerators
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    for style, shape, warmup in itertools.product(STYLES, WSD_STYLES, (0, 5)):
        rates = {"lr": 3e-4, "min_lr": 3e-5, "lr_warmup_iters": warmup}
        chosen = config(style, lr_wsd_decay_iters=9, lr_wsd_decay_style=shape, **rates)
        group: dict[str, float] = {}
        scheduler = OptimizerParamScheduler(
            SimpleNamespace(param_groups=[group]),
            init_lr=0.0,
            max_lr=chosen.lr,
            min_lr=chosen.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=30,
            lr_decay_style=style,
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=30,
            wd_incr_style="constant",
            wsd_decay_steps=9,
            lr_wsd_decay_style=shape,
        )
        for step in range(35):
            # its value before any `step` call is what the first update uses
            ours = learning_rate(chosen, step, train_iters=30)
            assert ours == pytest.approx(group["lr"], rel=1e-14), (style, shape, step)
            scheduler.step(1)
