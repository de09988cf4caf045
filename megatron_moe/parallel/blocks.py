"""Rectangles of logical tensors: what checkpoints store, what optimizers hand over, what loading fills."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from megatron_moe.parallel.layout import LogicalPiece, layout_of, logical_pieces
from megatron_moe.parallel.state import ParallelState


@dataclass(frozen=True)
class Block:
    """A rectangle of the logical tensor `name`, with its numbers here.

    tensor has the rectangle's shape and may be a view: loading fills it in place.  primary: this rank writes it; the
    other holders of the same rectangle only compare.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    primary: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def module_blocks(modules: Iterable[nn.Module], state: ParallelState, but: Set[str] = frozenset()) -> list[Block]:
    """All parameters and remembered states of this rank's stages as blocks under their logical names.

    but: names of parameters that are left out, for the modules do not hold them whole.
    """
    found: list[Block] = []
    known: set[int] = set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if name in but or id(parameter) in known:  # two stages of one rank share it
                continue
            known.add(id(parameter))
            found += parameter_blocks(name, parameter, state)
        found += [state_block(name, tensor, state) for name, tensor in module.named_buffers()]
    return found


def parameter_blocks(name: str, parameter: nn.Parameter, state: ParallelState) -> list[Block]:
    """What this rank holds of one parameter."""
    layout = layout_of(parameter)
    return [
        Block(piece.name, piece.global_shape, piece.offset, piece.of(parameter.data), layout.is_primary(state))
        for piece in logical_pieces(name, layout, state)
    ]


def state_block(name: str, tensor: Tensor, state: ParallelState) -> Block:
    """What a router remembers is the same on all ranks of its stage."""
    return Block(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, state.stage.is_first)


def flat_range_blocks(piece: LogicalPiece, prefix: str, flat: Tensor, start: int, primary: bool) -> list[Block]:
    """Blocks of the elements start..start+len(flat) of a rectangle, counted in its own row-major order.

    A flat range of an n-dimensional rectangle is at most 2n-1 rectangles.  flat: (length,), viewed, not copied.
    """
    blocks: list[Block] = []
    position = 0
    while position < flat.numel():
        offset, shape = _largest_rectangle(piece.shape, start + position, flat.numel() - position)
        count = prod(shape)
        blocks.append(
            Block(
                prefix + piece.name,
                piece.global_shape,
                tuple(own + inner for own, inner in zip(piece.offset, offset, strict=True)),
                flat[position : position + count].view(shape),
                primary,
            )
        )
        position += count
    return blocks


def _largest_rectangle(shape: tuple[int, ...], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of the largest rectangle that begins at flat position `start` and is at most `length` long."""
    offset = []
    rest = start
    for dim in range(len(shape)):
        stride = prod(shape[dim + 1 :])
        offset.append(rest // stride)
        rest %= stride
    for dim in range(len(shape)):
        stride = prod(shape[dim + 1 :])
        if start % stride == 0 and length >= stride:
            rows = min(length // stride, shape[dim] - offset[dim])
            return tuple(offset), (1,) * dim + (rows,) + shape[dim + 1 :]
    return tuple(offset), ()
