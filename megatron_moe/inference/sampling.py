"""From logits to the next token: greedy, or a draw from the distribution that temperature, top-k and top-p leave.

Pure functions of logits and one uniform number for each row, in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Applied in this order: temperature, top-k, top-p (as in transformers)."""

    greedy: bool = False  # always the likeliest token
    temperature: float = 1.0  # logits are divided by it
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the fewest tokens whose probabilities reach p  [arXiv:1904.09751]

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"--temperature {self.temperature:g}: expected a number above 0; for the likeliest token use --greedy."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k {self.top_k}: expected 1 or more tokens; leave it out to draw from all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p:g}: expected a share above 0, at most 1; leave it out for all.")
        if self.greedy and (self.temperature != 1.0 or self.top_k is not None or self.top_p is not None):
            raise ConfigError(
                "--greedy always takes the likeliest token, so that --temperature, --top-k and --top-p have no effect; "
                "leave out the one or the others."
            )


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) float64 -> (B, V) float64: what a draw follows; rows sum to 1, excluded tokens have 0.

    Among equally likely tokens the lower ids stay.
    """
    # the difference first: a tiny temperature must not turn the largest logit into infinity
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked[:, sampling.top_k :] = -math.inf
    shares = ranked.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        reached_before = shares.cumsum(dim=-1) - shares
        shares = shares.masked_fill(reached_before >= sampling.top_p, 0.0)
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return torch.zeros_like(shares).scatter_(-1, order, shares)


def draw(shares: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the running sum of a row passes its uniform number: (B, V), (B,) in [0, 1] -> (B,) int64."""
    sums = shares.cumsum(dim=-1)
    total = sums[:, -1]
    # below the total, however the product rounds: a token of probability 0 is never drawn
    threshold = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, threshold[:, None], right=True).squeeze(-1)


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row: logits (B, V) float64, uniform (B,) float64 -> (B,) int64; ties to the lowest id."""
    if sampling.greedy:
        return logits.argmax(dim=-1)
    return draw(probabilities(logits, sampling), uniform)


def draw_keys(samples: Tensor, position: int) -> Tensor:
    """What a draw is keyed by: samples (B,) int64, and the sequence index of the token to be drawn."""
    # 2^32 positions in a sequence are room enough
    return (samples << 32) + position
