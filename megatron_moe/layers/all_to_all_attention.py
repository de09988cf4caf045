"""All-to-all attention: ranks change the rows of all heads for all rows of some heads, and back.

[DeepSpeed Ulysses, arXiv:2309.14509]
"""

import math

import torch
from torch import Tensor

from megatron_moe.layers.attention_core import Sight, biased, mixed_by_torch
from megatron_moe.layers.context_parallel import sequence_order
from megatron_moe.parallel.collectives import exchange
from megatron_moe.parallel.state import Axis


class AllToAllAttention:
    """scaled_dot_product_attention over the whole sequence, for 1/cp of the heads.

    Where cp does not divide the key-value groups G, each group is sent to as many ranks as it takes, lcm(G, cp)/G, with
    a part of its heads; so cp must divide the heads. A bias is exchanged like the queries, in each layer.
    """

    def __init__(self, cp: Axis) -> None:
        self.cp = cp

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        if sight.cached:
            raise ValueError("tokens are decoded without context parallelism")
        shape = query.shape
        copies = math.lcm(shape[2], self.cp.size) // shape[2]
        split = (*shape[:2], shape[2] * copies, shape[3] // copies, shape[4])
        both = torch.stack([key, value], dim=3).repeat_interleave(copies, dim=2)
        query = self._all_rows(query.reshape(split), sight.queries.length)
        key, value = self._all_rows(both, sight.keys.length).unbind(dim=3)
        mask = self._mask(sight, query.device)
        mixed = mixed_by_torch(query, key, value, mask, sight.causal and mask is None)
        return self._all_heads(mixed).reshape(shape)

    def _all_rows(self, rows: Tensor, length: int) -> Tensor:
        """(S/cp, B, G, …) of this rank's rows -> (S, B, G/cp, …) of its groups, in the order of the sequence."""
        held, size = rows.shape[0], self.cp.size
        by_owner = torch.cat(rows.chunk(size, dim=2))
        arrived = exchange(by_owner, self.cp, [held] * size, [held] * size)
        return arrived[sequence_order(length, size, rows.device).argsort()]

    def _all_heads(self, rows: Tensor) -> Tensor:
        """(S, B, G/cp, …) in the order of the sequence -> (S/cp, B, G, …): back."""
        length, size = rows.shape[0], self.cp.size
        held = length // size
        by_owner = rows[sequence_order(length, size, rows.device)]
        arrived = exchange(by_owner, self.cp, [held] * size, [held] * size)
        return arrived.view(size, held, *arrived.shape[1:]).movedim(0, 2).flatten(2, 3)

    def _mask(self, sight: Sight, device: torch.device) -> Tensor | None:
        """(1 or B, 1 or heads/cp, S, S') bool or scores to add; None when the plain pattern will do."""
        if sight.plain:
            return None
        rows, columns = (torch.arange(view.length, device=device) for view in (sight.queries, sight.keys))
        allowed = sight.allowed(rows, columns)
        if sight.bias is None:
            return allowed
        # heads stand where key-value groups stand: (1 or B, heads, S/cp, S') as rows of heads
        by_row = self._all_rows(sight.bias.permute(2, 0, 1, 3), sight.queries.length)
        return biased(by_row.permute(1, 2, 0, 3), allowed)
