"""Dropout inside the experts, which may be stronger than elsewhere when a sparse model is fine-tuned.

Source: Switch, arXiv:2101.03961, section 4 and table 4 (0.4 in the experts beside 0.1 elsewhere); ST-MoE,
arXiv:2202.08906, section 4.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class ExpertDropout:
    """Zeroes inner features with probability `rate`, in steps of 2^-16, and scales the others up."""

    rate: float
    etp: Axis

    def __call__(self, inner: Tensor, tokens: Tensor, experts: Tensor, random: KeyedRandom) -> Tensor:
        """inner (R, F/etp); tokens, experts (R,) int64: the rows' keys, whatever rank they stand on."""
        draws = random.at(stream="expert_dropout")
        width = inner.shape[1]
        start = self.etp.rank * width
        # four features share the 64 bits of one draw
        words = torch.arange(start // 4, -(-(start + width) // 4), device=inner.device)
        bits = draws.bits(draws.bits(draws.bits(tokens) + experts)[:, None] + words)
        quarters = bits.view(torch.int16)[:, start % 4 : start % 4 + width]
        kept = quarters >= round(self.rate * 2**16) - 2**15
        return inner * kept * (1.0 / (1.0 - self.rate))
