"""A parameter's own statement of how it is split; everything else reads this and nothing else."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_moe.parallel.random import KeyedRandom, name_key
from megatron_moe.parallel.state import Axis, ParallelState


@dataclass(frozen=True)
class Init:
    """How a parameter starts: constant (`std` None) or normal with that deviation, cut at `cut` deviations if given."""

    std: float | None = None
    constant: float = 0.0
    cut: float | None = None


@dataclass(frozen=True)
class ParamLayout:
    """Global shape, which dimension is split over which axis, and over whom gradients are summed.

    splits: {dim: axis name}; a dimension is split evenly.  reduce_over: the axis of the replicas that see other tokens
    ("dp_cp" for dense, "edp" for expert parameters).  sum_over: further axes over which this rank's gradient is only a
    part (a norm under sequence parallelism, a tied embedding).  stacked: dim 0 counts experts, each a logical tensor.
    """

    global_shape: tuple[int, ...]
    splits: dict[int, str] = field(default_factory=dict)
    reduce_over: str = "dp_cp"
    sum_over: tuple[str, ...] = ()
    stacked: bool = False
    decay: bool = True
    init: Init = Init()

    def local_shape(self, *axes: Axis) -> tuple[int, ...]:
        """The part on one rank, given the axes that `splits` names."""
        sizes = {axis.name: axis.size for axis in axes}
        shape = list(self.global_shape)
        for dim, name in self.splits.items():
            if shape[dim] % sizes[name]:
                raise ValueError(
                    f"dimension {dim} of {self.global_shape} does not split over {sizes[name]} ranks of {name}"
                )
            shape[dim] //= sizes[name]
        return tuple(shape)

    def offset(self, state: ParallelState) -> tuple[int, ...]:
        """Where this rank's part begins in the global tensor."""
        start = [0] * len(self.global_shape)
        for dim, name in self.splits.items():
            axis = state.axis(name)
            start[dim] = self.global_shape[dim] // axis.size * axis.rank
        return tuple(start)

    @property
    def replica_axes(self) -> tuple[str, ...]:
        """Axes, besides reduce_over, along which every rank holds the same numbers."""
        view = ("ep", "etp") if self.reduce_over == "edp" else ("tp",)
        # the axes that a weight is tied over
        tied = tuple(name for name in self.sum_over if name in ("embedding", "pp"))
        return tuple(name for name in view if name not in self.splits.values()) + tied

    def is_primary(self, state: ParallelState) -> bool:
        """True on the one rank, among all that hold the same numbers, which speaks for them."""
        return all(state.axis(name).is_first for name in (*self.replica_axes, self.reduce_over))


def layout_of(parameter: Tensor) -> ParamLayout:
    """The layout that `new_parameter` attached."""
    layout: ParamLayout = parameter.placement  # type: ignore[attr-defined]
    return layout


def new_parameter(layout: ParamLayout, *axes: Axis, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of this rank's shape on the meta device, carrying its layout."""
    parameter = nn.Parameter(torch.empty(layout.local_shape(*axes), dtype=dtype, device="meta"))
    parameter.placement = layout  # type: ignore[attr-defined]
    return parameter


@dataclass(frozen=True)
class LogicalPiece:
    """This rank's rectangle of one logical tensor (an expert of a stack is a tensor of its own)."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    index: int | None  # place in the local stack, None when not stacked

    def of(self, local: Tensor) -> Tensor:
        """The view of the local tensor that this piece names."""
        return local if self.index is None else local[self.index]


def logical_pieces(name: str, layout: ParamLayout, state: ParallelState) -> list[LogicalPiece]:
    """What this rank holds of the logical tensors behind parameter `name`.

    A stacked `layers.3.mlp.experts.w1` becomes `layers.3.mlp.experts.{e}.w1`, one for each local expert e.
    """
    shape = layout.local_shape(*(state.axis(axis) for axis in layout.splits.values()))
    offset = layout.offset(state)
    if not layout.stacked:
        return [LogicalPiece(name, layout.global_shape, offset, shape, None)]
    room, leaf = name.rsplit(".", 1)
    return [
        LogicalPiece(f"{room}.{offset[0] + index}.{leaf}", layout.global_shape[1:], offset[1:], shape[1:], index)
        for index in range(shape[0])
    ]


def _global_indices(piece: LogicalPiece, start: int, stop: int, device: torch.device) -> Tensor:
    """Flat positions, in the whole logical tensor, of elements start..stop of this rectangle."""
    rest = torch.arange(start, stop, dtype=torch.int64, device=device)
    flat = torch.zeros_like(rest)
    stride = 1
    for dim in reversed(range(len(piece.shape))):
        flat += (rest % piece.shape[dim] + piece.offset[dim]) * stride
        rest = rest // piece.shape[dim]
        stride *= piece.global_shape[dim]
    return flat


_CHUNK = 1 << 22  # elements initialised at a time, so that temporaries stay small


def initialise(parameter: Tensor, name: str, state: ParallelState, seed: int) -> None:
    """Fill in place: each element depends on (seed, logical name, global index) only."""
    layout = layout_of(parameter)
    with torch.no_grad():
        if layout.init.std is None:
            parameter.fill_(layout.init.constant)
            return
        for piece in logical_pieces(name, layout, state):
            random = KeyedRandom(seed, stream="init", layer=name_key(piece.name))
            flat = piece.of(parameter).view(-1)
            for start in range(0, flat.numel(), _CHUNK):
                stop = min(start + _CHUNK, flat.numel())
                keys = _global_indices(piece, start, stop, flat.device)
                flat[start:stop] = (_draw(random, keys, layout.init.cut) * layout.init.std).to(flat.dtype)


def _draw(random: KeyedRandom, keys: Tensor, cut: float | None) -> Tensor:
    if cut is None:
        return random.normal(keys)
    # inverse distribution function on the kept part of the bell: exact, no rejection
    edge = torch.special.ndtr(torch.tensor(-cut, dtype=torch.float64, device=keys.device))
    drawn: Tensor = torch.special.ndtri(edge + (1.0 - 2.0 * edge) * random.uniform(keys))
    return drawn


def materialise(
    module: nn.Module, state: ParallelState, seed: int, device: torch.device, *, prefix: str = ""
) -> None:
    """Give every meta parameter of a module memory on `device` and its first value.

    prefix: what stands before the module's own names in the stage's.
    """
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        owner, leaf = _owner(module, name)
        real = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
        real.placement = layout_of(parameter)  # type: ignore[attr-defined]
        initialise(real, prefix + name, state, seed)
        owner.register_parameter(leaf, real)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            raise RuntimeError(f"buffer {name} was left on meta; make buffers with their values")
        owner, leaf = _owner(module, name)
        owner.register_buffer(leaf, buffer.to(device))


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
