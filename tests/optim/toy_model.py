"""Parameters of every kind with made-up gradients, and a plain whole-model optimizer in NumPy to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.optim.bucket import NamedParameter
from megatron_moe.optim.clip import clip_
from megatron_moe.optim.gradients import GradientBuckets
from megatron_moe.optim.zero import ShardedAdamW
from megatron_moe.parallel.blocks import Block, module_blocks
from megatron_moe.parallel.layout import Init, ParamLayout, materialise, new_parameter
from megatron_moe.parallel.random import KeyedRandom, name_key
from megatron_moe.parallel.state import Axis, ParallelState

Whole = dict[str, NDArray[np.float64]]

SEED = 7
LEARNING_RATES = (0.02, 0.05, 0.01, 0.03)
# the second step's gradient is small enough not to be clipped
GRADIENT_SCALES = (1.0, 1e-3, 0.5, 2.0)
CONFIG = OptimizerConfig(lr=0.05, weight_decay=0.1, clip_grad=1.0)

_NORMAL = Init(std=0.5)
# first stage
FRONT = {
    "embedding.weight": ParamLayout((40, 12), {0: "tp"}, sum_over=("embedding",), init=_NORMAL),
    # under sequence parallelism each tp rank sees a part of the tokens
    "layers.0.attention_norm.weight": ParamLayout((37,), sum_over=("tp",), decay=False, init=_NORMAL),
    # every tp rank computes the same gradient
    "layers.0.attention.k_norm.weight": ParamLayout((19,), decay=False, init=_NORMAL),
    "layers.0.mlp.w1": ParamLayout((2, 24, 12), {1: "tp"}, init=_NORMAL),
}
# last stage
BACK = {
    "layers.1.mlp.router.weight": ParamLayout((8, 12), sum_over=("tp",), init=_NORMAL),
    "layers.1.mlp.experts.w1": ParamLayout(
        (8, 2, 12, 5), {0: "ep", 2: "etp"}, reduce_over="edp", stacked=True, init=_NORMAL
    ),
    # split over ep only: the etp ranks hold the same numbers
    "layers.1.mlp.experts.scale": ParamLayout(
        (8, 23), {0: "ep"}, reduce_over="edp", stacked=True, decay=False, init=_NORMAL
    ),
    "final_norm.weight": ParamLayout((12,), sum_over=("tp",), decay=False, init=_NORMAL),
}
LAYOUTS = FRONT | BACK


def stage_layouts(state: ParallelState) -> list[dict[str, ParamLayout]]:
    """Two stages: both here, or one on each of two pipeline ranks, which then share the embedding."""
    if state.pp.size == 1:
        return [FRONT, BACK]
    return [FRONT] if state.pp.is_first else [BACK | {"embedding.weight": LAYOUTS["embedding.weight"]}]


def make(layouts: Mapping[str, ParamLayout], state: ParallelState, dtype: torch.dtype) -> nn.Module:
    """A module with this rank's part of the parameters, initialised by name."""
    root = nn.Module()
    for name, layout in layouts.items():
        *path, leaf = name.split(".")
        room = root
        for word in path:
            if word not in dict(room.named_children()):
                room.add_module(word, nn.Module())
            room = room.get_submodule(word)
        axes = [state.axis(axis) for axis in layout.splits.values()]
        room.register_parameter(leaf, new_parameter(layout, *axes, dtype=dtype))
    materialise(root, state, SEED, torch.device("cpu"))
    return root


def build(state: ParallelState, dtype: torch.dtype) -> list[nn.Module]:
    """This rank's stages."""
    return [make(layouts, state, dtype) for layouts in stage_layouts(state)]


def named(stages: Sequence[nn.Module]) -> list[list[NamedParameter]]:
    """The parameters of each stage."""
    return [list(stage.named_parameters()) for stage in stages]


def local_part(whole: NDArray[np.float64], layout: ParamLayout, state: ParallelState) -> NDArray[np.float64]:
    """This rank's slice of a whole parameter, cut dimension by dimension."""
    for dim, name in layout.splits.items():
        axis = state.axis(name)
        whole = np.split(whole, axis.size, axis=dim)[axis.rank]
    return whole


def initial_weights(dtype: torch.dtype) -> Whole:
    """Every whole parameter as `build` begins it, exactly."""
    stages = named(build(ParallelState.alone(), dtype))
    return {name: parameter.detach().double().numpy() for stage in stages for name, parameter in stage}


def whole_gradient(name: str, step: int) -> NDArray[np.float64]:
    """The gradient of the whole batch."""
    shape = LAYOUTS[name].global_shape
    keys = torch.arange(int(np.prod(shape)))
    draws = KeyedRandom(SEED, step=step, stream="gradient", layer=name_key(name)).normal(keys)
    return GRADIENT_SCALES[step] * draws.view(shape).numpy()


def _part(axis: Axis) -> float:
    """What this rank contributes: shares that differ and add up to 1."""
    return 2.0 * (axis.rank + 1) / (axis.size * (axis.size + 1))


def accumulate(stages: Sequence[nn.Module], state: ParallelState, step: int) -> None:
    """What a backward pass does: add this rank's part of the gradient, in two microbatches."""
    for name, parameter in (pair for stage in named(stages) for pair in stage):
        layout = LAYOUTS[name]
        local = torch.from_numpy(local_part(whole_gradient(name, step), layout, state).copy())
        for axis in (layout.reduce_over, *layout.sum_over):
            local = local * _part(state.axis(axis))
        main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        main_grad.add_(local * 0.25)
        main_grad.add_(local * 0.75)


def make_buckets(stages: Sequence[nn.Module], state: ParallelState, sharded: bool) -> GradientBuckets:
    """Small buckets, so that there are several and shards cut through parameters."""
    return GradientBuckets(named(stages), state, bucket_elements=700, sharded=sharded)


@dataclass
class Training:
    """A toy run on this rank, step by step."""

    state: ParallelState
    dtype: torch.dtype = torch.float64
    sharded: bool = True
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = build(self.state, self.dtype)
        self.buckets = make_buckets(self.stages, self.state, self.sharded)
        self.optimizer = ShardedAdamW(self.buckets, CONFIG)

    def run(self, steps: range) -> "Training":
        """Make these steps, reducing stage by stage as an executor does."""
        for step in steps:
            self.buckets.zero_()
            accumulate(self.stages, self.state, step)
            self.buckets.reduce(stage=0)
            self.buckets.reduce()
            self.norms.append(clip_(self.buckets, CONFIG.clip_grad))
            self.optimizer.step(LEARNING_RATES[step])
        return self

    def parameters(self) -> list[NamedParameter]:
        return [pair for stage in named(self.stages) for pair in stage]

    def blocks(self) -> list[Block]:
        """What a checkpoint of this rank holds."""
        return [*module_blocks(self.stages, self.state), *self.optimizer.blocks()]


@dataclass
class Oracle:
    """AdamW with clipping on whole tensors, by the book."""

    weights: Whole
    exp_avg: Whole = field(default_factory=dict)
    exp_avg_sq: Whole = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)

    def run(self, steps: int) -> "Oracle":
        self.exp_avg = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self.exp_avg_sq = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        for step in range(steps):
            gradients = {name: whole_gradient(name, step) for name in LAYOUTS}
            self.norms.append(float(np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))))
            scale = min(1.0, CONFIG.clip_grad / (self.norms[-1] + 1e-6))
            for name, gradient in gradients.items():
                self._update(name, gradient * scale, step)
        return self

    def _update(self, name: str, gradient: NDArray[np.float64], step: int) -> None:
        beta1, beta2, lr = CONFIG.adam_beta1, CONFIG.adam_beta2, LEARNING_RATES[step]
        decay = CONFIG.weight_decay if LAYOUTS[name].decay else 0.0
        mean = self.exp_avg[name] = beta1 * self.exp_avg[name] + (1 - beta1) * gradient
        square = self.exp_avg_sq[name] = beta2 * self.exp_avg_sq[name] + (1 - beta2) * gradient**2
        mean, square = mean / (1 - beta1 ** (step + 1)), square / (1 - beta2 ** (step + 1))
        weight = self.weights[name]
        self.weights[name] = weight - lr * decay * weight - lr * mean / (np.sqrt(square) + CONFIG.adam_eps)


def worst_error(training: Training, oracle: Oracle) -> tuple[float, float]:
    """Largest relative error of any weight tensor, and of any norm."""
    errors = []
    for name, parameter in training.parameters():
        want = local_part(oracle.weights[name], LAYOUTS[name], training.state)
        errors.append(np.abs(parameter.detach().double().numpy() - want).max() / np.abs(want).max())
    norms = [abs(got - want) / want for got, want in zip(training.norms, oracle.norms, strict=True)]
    return float(max(errors)), max(norms)
