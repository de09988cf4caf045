"""Weights, gradients and optimizer split over the replicas: ZeRO stage 3, by FSDP2.  [Rajbhandari, arXiv:1910.02054]

    a unit's forward, and backward:   this rank's parts → all-gather → whole weights in the model's dtype → freed
    behind its backward:              whole gradients → reduce-scatter, wide → added to this rank's part

What lasts is wide and this rank's own: the weights, their gradients, the moments. Each microbatch is reduced at once,
so that a rank holds whole gradients of one unit only. What has no second rank to be shared with stays as it was.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatron_moe.optim.bucket import aligned, wide_dtype
from megatron_moe.optim.gradients import GradientBuckets
from megatron_moe.optim.owned import OwnBucket, copies_of
from megatron_moe.parallel.blocks import Block, module_blocks
from megatron_moe.parallel.communicator import Torch
from megatron_moe.parallel.copies import Copy, module_copies
from megatron_moe.parallel.layout import LogicalPiece, ParamLayout, layout_of, logical_pieces
from megatron_moe.parallel.state import Axis, ParallelState

# rows for each rank from which on an uneven split of dimension 0 is even enough
_MANY = 8


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together when the forward pass of `module` begins, wherever below it they stand.

    Nobody reads them outside of that pass, unless `lasting`: then they stay until the backward pass is over.
    """

    module: nn.Module
    reduce_over: str
    dtype: torch.dtype
    lasting: bool = False

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter below the module, not yet sharded, is one of them."""
        if isinstance(parameter, DTensor) or not parameter.requires_grad or parameter.dtype != self.dtype:
            return False
        return layout_of(parameter).reduce_over == self.reduce_over


def split_dim(shape: Sequence[int], ranks: int) -> int:
    """The dimension that is split: the first one that splits evenly, or well enough; the first one when none does."""
    if shape[0] >= _MANY * ranks:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


@dataclass(frozen=True)
class Slab:
    """What this rank owns of one parameter: indices start.. of dimension `dim` of what its replicas hold together.

    shape: of the part.   place: where it lies, flat, in the shard.
    """

    name: str
    layout: ParamLayout
    dim: int
    start: int
    shape: tuple[int, ...]
    place: slice

    def of(self, shard: Tensor) -> Tensor:
        return shard[self.place]

    def blocks(self, prefix: str, flat: Tensor, primary: bool, state: ParallelState) -> list[Block]:
        """One rectangle, or one of each expert in a stack."""
        values = flat.view(self.shape)
        pieces = logical_pieces(self.name, self.layout, state)
        if not self.layout.stacked:
            return [self._block(prefix, pieces[0], values, self.dim, primary)]
        if self.dim == 0:
            pieces = pieces[self.start : self.start + self.shape[0]]
            return [
                Block(prefix + piece.name, piece.global_shape, piece.offset, part, primary)
                for piece, part in zip(pieces, values.unbind(), strict=True)
            ]
        return [
            self._block(prefix, piece, part, self.dim - 1, primary)
            for piece, part in zip(pieces, values.unbind(), strict=True)
        ]

    def _block(self, prefix: str, piece: LogicalPiece, values: Tensor, dim: int, primary: bool) -> Block:
        offset = list(piece.offset)
        offset[dim] += self.start
        return Block(prefix + piece.name, piece.global_shape, tuple(offset), values, primary)


class ShardedParameter:
    """A bucket of one parameter. The weights, wide, are the storage that FSDP gathers from."""

    def __init__(self, slab: Slab, parameter: DTensor, dtype: torch.dtype, state: ParallelState) -> None:
        """dtype: in which modules see it."""
        self.slab = slab
        self.dtype = dtype
        self.segments = (slab,) if prod(slab.shape) else ()
        self._parameter = parameter
        self._state = state
        with torch.no_grad():
            self.own_weights = parameter.to_local().view(-1)
        self.own_gradients = torch.empty(0)

    def accumulate_in(self, gradients: Tensor) -> None:
        """From now on reduced gradients are added to this flat wide tensor."""
        self.own_gradients = gradients
        own = self._parameter
        own.grad = DTensor.from_local(
            gradients.view(self.slab.shape),
            own.device_mesh,
            own.placements,
            run_check=False,
            shape=own.shape,
            stride=own.stride(),
        )

    def replica_axes(self, layout: ParamLayout) -> tuple[str, ...]:
        return layout.replica_axes

    def speaks_for(self, layout: ParamLayout) -> bool:
        return all(self._state.axis(name).is_first for name in self.replica_axes(layout))

    def publish(self, master: Tensor) -> None:
        """Nothing to do: the next forward pass gathers from the masters."""

    def blocks_of(self, weights: Tensor) -> list[Block]:
        """Blocks of the model that view weights as long as this rank's own."""
        primary = self.speaks_for(self.slab.layout)
        return [block for part in self.segments for block in part.blocks("", part.of(weights), primary, self._state)]


class Sharder:
    """Shards units of a stage one after another; outer ones before those inside them, the whole stage last."""

    def __init__(self, state: ParallelState, device: torch.device) -> None:
        self.parameters: list[ShardedParameter] = []
        self._state = state
        self._device = device
        self._meshes: dict[str, DeviceMesh] = {}
        # it warns of writing in place into what a layer returned: no layer here does
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)

    def shard(self, units: Sequence[Unit], prefix: str = "") -> None:
        """prefix: what stands before the names of the first unit's module. Its parameters are in memory."""
        modules = {id(module): name for name, module in units[0].module.named_modules(prefix=prefix.rstrip("."))}
        for unit in units:
            room = modules[id(unit.module)]
            self._shard(unit, f"{room}." if room else "")

    def _shard(self, unit: Unit, prefix: str) -> None:
        axis = self._state.axis(unit.reduce_over)
        named = dict(unit.module.named_parameters())
        layouts = {
            name: layout_of(weight) for name, weight in named.items() if axis.size > 1 and unit.holds(weight)
        }
        # whatever is sharded at all needs one module around it that sees the whole pass
        if not layouts and not (unit.lasting and self.parameters):
            return
        mesh_axis = axis if axis.size > 1 else self._state.edp
        for name in layouts:
            _widen(unit.module, name)
        others = {weight for name, weight in unit.module.named_parameters() if name not in layouts}
        fully_shard(
            unit.module,
            mesh=self._mesh(mesh_axis),
            reshard_after_forward=not unit.lasting,
            shard_placement_fn=lambda weight: Shard(split_dim(weight.shape, mesh_axis.size)),
            mp_policy=MixedPrecisionPolicy(unit.dtype, wide_dtype(unit.dtype), cast_forward_inputs=False),
            ignored_params=others,
        )
        assert isinstance(unit.module, FSDPModule)
        # the loss is divided already
        unit.module.set_gradient_divide_factor(1.0)
        unit.module.set_force_sum_reduction_for_comms(True)
        for name, layout in layouts.items():
            sharded = unit.module.get_parameter(name)
            assert isinstance(sharded, DTensor)
            slab = _slab(prefix + name, layout, sharded, axis)
            self.parameters.append(ShardedParameter(slab, sharded, unit.dtype, self._state))

    def _mesh(self, axis: Axis) -> DeviceMesh:
        if axis.name not in self._meshes:
            assert isinstance(axis.comm, Torch)
            self._meshes[axis.name] = axis.comm.mesh(self._device)
        return self._meshes[axis.name]


def _widen(module: nn.Module, name: str) -> None:
    """Replace a parameter by its wide master."""
    room, _, leaf = name.rpartition(".")
    parameter = module.get_parameter(name)
    wide = nn.Parameter(parameter.data.to(wide_dtype(parameter.dtype)))
    module.get_submodule(room).register_parameter(leaf, wide)


def _slab(name: str, layout: ParamLayout, sharded: DTensor, axis: Axis) -> Slab:
    dim = split_dim(sharded.shape, axis.size)
    each = -(-sharded.shape[dim] // axis.size)
    with torch.no_grad():
        local = sharded.to_local()
    start = min(each * axis.rank, sharded.shape[dim])
    return Slab(name, layout, dim, start, tuple(local.shape), slice(0, local.numel()))


class FullyShardedParameters:
    """The gradients of a stage whose units are sharded, as buckets; and its weights, for checkpoints.

    What is not sharded (it has no replica, or stands beside parameters of another dtype in a module) is in
    GradientBuckets, with ZeRO-1.
    """

    def __init__(
        self,
        stage: nn.Module,
        sharded: Sequence[ShardedParameter],
        state: ParallelState,
        device: torch.device,
        *,
        bucket_elements: int,
    ) -> None:
        self.state = state
        self.device = device
        self._stage = stage
        self._sharded = sharded
        self._names = {parameter.slab.name for parameter in sharded}
        whole = [
            (name, weight)
            for name, weight in stage.named_parameters()
            if name not in self._names and weight.requires_grad
        ]
        self._whole = GradientBuckets([whole], state, bucket_elements=bucket_elements, sharded=True) if whole else None
        self._gradients = self._allocate()
        self._complete = True

    def _allocate(self) -> dict[tuple[str, ...], Tensor]:
        """Flat gradients of parameters that are summed over the same further axes."""
        groups: dict[tuple[str, ...], list[ShardedParameter]] = {}
        for parameter in self._sharded:
            groups.setdefault(parameter.slab.layout.sum_over, []).append(parameter)
        found = {}
        for sums, members in groups.items():
            lengths = [aligned(member.own_weights.numel()) for member in members]
            found[sums] = torch.zeros(sum(lengths), dtype=members[0].own_weights.dtype, device=self.device)
            for member, room in zip(members, found[sums].split(lengths), strict=True):
                member.accumulate_in(room[: member.own_weights.numel()])
        return found

    @property
    def buckets(self) -> Sequence[OwnBucket]:
        return [*(self._whole.buckets if self._whole is not None else ()), *self._sharded]

    def zero_(self) -> None:
        """Start a step: no gradient yet."""
        for flat in self._gradients.values():
            flat.zero_()
        if self._whole is not None:
            self._whole.zero_()
        self._complete = False

    def layer_done(self, stage: int, layer: int) -> None:
        """Nothing to do: what is sharded is summed by its backward pass, the little that is not at the end."""

    def await_weights(self, layer: int | None) -> None:
        """Those that are sharded are gathered when they are used."""
        if self._whole is not None:
            self._whole.await_weights(layer)

    def settle(self) -> None:
        if self._whole is not None:
            self._whole.settle()

    def reduce(self, stage: int | None = None) -> None:
        """What backward passes have not summed: over further axes than the replicas', and what is not sharded."""
        if self._whole is not None:
            self._whole.reduce(stage)
        if self._complete:
            return
        self._complete = True
        for sums, flat in self._gradients.items():
            for name in sums:
                self.state.axis(name).comm.all_reduce_(flat)

    def rest(self) -> None:
        """Free what a forward pass gathered that no backward pass follows."""
        if isinstance(self._stage, FSDPModule):
            self._stage.reshard()

    def weight_copies(self) -> list[Copy]:
        """What of the weights and remembered states other ranks hold too; of those that are sharded, the masters."""
        found = module_copies([self._stage], self.state, but=self._names)
        for parameter in self._sharded:
            found += copies_of(parameter, "", parameter.own_weights, self.state)
        return found

    def weight_blocks(self) -> list[Block]:
        """All parameters and remembered states of the stage in the model's dtype; to read, for they may be copies."""
        return self._blocks([parameter.own_weights.to(parameter.dtype) for parameter in self._sharded])

    def fill_weights(self, fill: Callable[[list[Block]], object]) -> None:
        """Let `fill` write the same blocks."""
        weights = [parameter.own_weights.to(parameter.dtype) for parameter in self._sharded]
        fill(self._blocks(weights))
        for parameter, values in zip(self._sharded, weights, strict=True):
            parameter.own_weights.copy_(values)

    def _blocks(self, weights: Sequence[Tensor]) -> list[Block]:
        found = module_blocks([self._stage], self.state, but=self._names)
        for parameter, values in zip(self._sharded, weights, strict=True):
            found += parameter.blocks_of(values)
        return found
