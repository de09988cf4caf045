"""Keys and values of the tokens so far, so that a new token costs one row instead of the whole sequence."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from megatron_moe.layers.attention import Attention
from megatron_moe.models.depth import DepthLayer
from megatron_moe.models.gpt import GPTStage


class ReservedCache:
    """Keys and values of each layer, (max_length, B, G/tp, D), reserved at once.

    The one thing that a forward pass writes to: each layer appends once a pass, and all stand at the same position
    between passes.
    """

    def __init__(
        self,
        heads: Mapping[int, tuple[int, int]],
        *,
        max_length: int,
        num_samples: int,
        dtype: torch.dtype,
        device: torch.device,
        choosing: Collection[int] = (),
    ) -> None:
        """heads: (groups, width) of this rank's part of each layer, by global index.   choosing: those that pass some
        tokens by."""
        self.max_length = max_length
        self._filled = dict.fromkeys(heads, 0)
        self._kept_source: dict[int, tuple[Tensor, Tensor]] = {}

        def reserve(groups: int, width: int) -> Tensor:
            return torch.empty(max_length, num_samples, groups, width, dtype=dtype, device=device)

        self._keys = {layer: reserve(*shape) for layer, shape in heads.items()}
        self._values = {layer: reserve(*shape) for layer, shape in heads.items()}
        self._kept = {
            layer: torch.zeros(max_length, num_samples, dtype=torch.bool, device=device) for layer in choosing
        }

    @classmethod
    def for_stages(
        cls, stages: Sequence[GPTStage], *, max_length: int, num_samples: int, device: torch.device
    ) -> "ReservedCache":
        """Room for the layers that this rank holds."""
        modules = [module for stage in stages for module in stage.modules()]
        encoder = stages[0].spec.encoder_layers  # which runs once, over whole texts
        found = [module for module in modules if isinstance(module, Attention) and module.index >= encoder]
        choosing = [module.index for module in modules if isinstance(module, DepthLayer) and module.index >= encoder]
        heads = {attention.index: (attention.qkv.shape[0], attention.shape.head_dim) for attention in found}
        return cls(
            heads,
            max_length=max_length,
            num_samples=num_samples,
            dtype=stages[0].spec.dtype,
            device=device,
            choosing=choosing,
        )

    @property
    def position(self) -> int:
        """Tokens that all layers hold: the sequence index of the next one. 0 where no layer keeps any."""
        return min(self._filled.values(), default=0)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (S, B, G/tp, D) of the new tokens; returns views of all so far, (past + S, B, G/tp, D).

        Raises ValueError when they do not fit.
        """
        start, end = self._room(layer, len(keys))
        self._keys[layer][start:end] = keys
        self._values[layer][start:end] = values
        self._filled[layer] = end
        return self._keys[layer][:end], self._values[layer][:end]

    def append_kept(self, layer: int, kept: Tensor) -> Tensor:
        """Add (S, B) bool of the new tokens, whose keys follow in `append`; returns all so far, (past + S, B).

        Raises ValueError when they do not fit.
        """
        start, end = self._room(layer, len(kept))
        self._kept[layer][start:end] = kept
        return self._kept[layer][:end]

    def keep(self, layer: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, (S', B, G/tp, D) each, made at the first call."""
        if layer not in self._kept_source:
            self._kept_source[layer] = make()
        return self._kept_source[layer]

    def _room(self, layer: int, tokens: int) -> tuple[int, int]:
        """Where the next tokens stand."""
        start = self._filled[layer]
        if start + tokens > self.max_length:
            raise ValueError(f"{start + tokens} tokens do not fit into a cache of {self.max_length}")
        return start, start + tokens

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on, to try others. Raises ValueError for one that lies ahead."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to {position}: the cache holds {self.position} tokens")
        self._filled = dict.fromkeys(self._filled, position)
