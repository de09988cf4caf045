"""One name for each tensor of a layer and of an expert, however the checkpoint keeps them.

    decoder.layers.self_attention.linear_qkv.weight (L, ...)        all layers in one      layer l: slice l
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight (E, ...)  all experts in one     expert e: slice e
    ...linear_fc1.weight_w, ...linear_fc1.weight_v                   gate and up apart      one below the other
    ...linear_qkv.layer_norm_weight                                  norms fused (TE)       input_layernorm.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_moe.config.errors import CheckpointError
from megatron_moe.convert.megatron.stored import PlainFiles, Stored
from megatron_moe.convert.tensors import Shape

LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(.+)")
HALF = re.compile(r"(.+\.linear_fc1\.(?:weight|bias))_([wv])")
NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}


@dataclass(frozen=True)
class Slice:
    """The part of a stored tensor at `lead`, indices of its first dimensions. order: of gate and up, 0 and 1."""

    stored: Stored
    lead: Shape = ()
    order: int | None = None

    @property
    def shape(self) -> Shape:
        return self.stored.shape[len(self.lead) :]


class MegatronSource:
    """A TensorSource over one tensor for each layer and expert.

    num_layers: L, which stacked tensors have to have.   CheckpointError if a tensor is there twice, or half.
    """

    def __init__(self, tensors: Mapping[str, Stored], files: PlainFiles, num_layers: int) -> None:
        self._files = files
        self._places: dict[str, tuple[Slice, ...]] = {}
        self._rows: dict[str, int] = {}
        for stored in tensors.values():
            for name, place in _slices(stored, num_layers):
                self._add(name, place)
        for name, places in self._places.items():
            if len(places) == 1 and places[0].order is not None:
                raise CheckpointError(f"tensor {name} has only one of its halves, {places[0].stored.name}.")
            if len({place.shape for place in places}) > 1:
                raise CheckpointError(f"tensor {name}: gate and up have different shapes.")

    def _add(self, name: str, place: Slice) -> None:
        before = self._places.get(name, ())
        if any(place.order is None or one.order in (None, place.order) for one in before):
            raise CheckpointError(f"tensor {name} is there twice, in {before[0].stored.name} and {place.stored.name}.")
        self._places[name] = tuple(sorted((*before, place), key=lambda one: one.order or 0))

    def names(self) -> Sequence[str]:
        """One for each layer and expert."""
        return list(self._places)

    def shape(self, name: str) -> Shape:
        """Without reading; of a vocabulary as many rows as are kept."""
        places = self._places[name]
        first, *rest = places[0].shape or (1,)
        return (self._rows.get(name, first * len(places)), *rest) if places[0].shape else ()

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._places[name][0].stored.dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor, put together from its pieces."""
        places = self._places[name]
        whole = [place.stored.read(place.lead, self._files) for place in places]
        return (whole[0] if len(whole) == 1 else torch.cat(whole))[: self._rows.get(name)]

    def keep_rows(self, name: str, rows: int) -> None:
        """Leave out what follows the first `rows` rows, the padding of a vocabulary."""
        self._rows[name] = rows

    def without(self, name: str) -> None:
        """Forget a tensor that repeats another."""
        del self._places[name]


def _slices(stored: Stored, num_layers: int) -> Iterator[tuple[str, Slice]]:
    match = LAYER.fullmatch(stored.name)
    if match is None:
        yield stored.name, Slice(stored)
        return
    place = Slice(stored)
    if match[1] is not None:
        yield from _of_layer(int(match[1]), match[2], place)
        return
    if not stored.shape or stored.shape[0] != num_layers:
        raise CheckpointError(
            f"tensor {stored.name} has the shape {list(stored.shape)}, which is no stack of {num_layers} layers."
        )
    for layer in range(num_layers):
        yield from _of_layer(layer, match[2], replace(place, lead=(layer,)))


def _of_layer(layer: int, rest: str, place: Slice) -> Iterator[tuple[str, Slice]]:
    prefix = f"decoder.layers.{layer}."
    rest = NORMS.get(rest, rest)
    if half := HALF.fullmatch(rest):
        rest, place = half[1], replace(place, order="wv".index(half[2]))
    expert = EXPERT.fullmatch(rest)
    if expert is None:
        yield prefix + rest, place
    elif expert[1] is not None:
        yield f"{prefix}mlp.experts.{int(expert[1])}.{expert[2]}", place
    else:
        if not place.shape:
            raise CheckpointError(f"tensor {place.stored.name} {list(place.stored.shape)} is no stack of experts.")
        for number in range(place.shape[0]):
            yield f"{prefix}mlp.experts.{number}.{expert[2]}", replace(place, lead=(*place.lead, number))
