"""AdamW on this rank's share of the weights, in wide precision: ZeRO stage 1.  [Rajbhandari, arXiv:1910.02054]

gradients (reduced) → AdamW on the shard → cast to the model's dtype → all-gather into the parameters

The same serves stage 3, where the last two steps are the next forward pass's (fully_sharded.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.optim.adamw import AdamWSegment, adamw_
from megatron_moe.optim.bucket import wide_dtype
from megatron_moe.optim.owned import Gradients, OwnBucket, Part, copies_of
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.copies import Copy


@dataclass(frozen=True)
class Shard:
    """A bucket with the optimizer's own numbers for the part that this rank owns, each (shard_elements,) wide.

    master: the weights; when the model is wide already, they are the parameters' own storage.
    """

    bucket: OwnBucket
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, bucket: OwnBucket) -> "Shard":
        """Moments at zero, masters equal to the weights."""
        master = bucket.own_weights.to(wide_dtype(bucket.dtype))
        return cls(bucket, master, torch.zeros_like(master), torch.zeros_like(master))

    @property
    def has_master(self) -> bool:
        """Whether the masters are more than the parameters themselves."""
        return self.master.dtype != self.bucket.dtype

    @property
    def kinds(self) -> dict[str, Tensor]:
        """What belongs to the optimizer alone, by the prefix of its name."""
        found = {"exp_avg/": self.exp_avg, "exp_avg_sq/": self.exp_avg_sq}
        return found | {"master/": self.master} if self.has_master else found

    def cut(self, segment: Part) -> AdamWSegment:
        """One parameter's part of everything."""
        gradients = segment.of(self.bucket.own_gradients)
        return AdamWSegment(segment.of(self.master), gradients, segment.of(self.exp_avg), segment.of(self.exp_avg_sq))


class ShardedAdamW:
    """Updates the parameters behind `buckets` from their reduced gradients; decays only where the layout says so.

    overlap: a step returns while the weights are still being gathered; `buckets` waits for them.
    Collective: all ranks step together.
    """

    def __init__(self, buckets: Gradients, config: OptimizerConfig, *, overlap: bool = False) -> None:
        self.step_count = 0  # updates made
        self._buckets = buckets
        self._overlap = overlap
        self._config = config
        self._state = buckets.state
        self._shards = [Shard.of(bucket) for bucket in buckets.buckets]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at this learning rate."""
        self.step_count += 1
        self._update(lr, self._config.weight_decay, decayed=True)
        self._update(lr, 0.0, decayed=False)
        for shard in self._shards:
            shard.bucket.publish(shard.master)
        if not self._overlap:
            self._buckets.settle()

    def _update(self, lr: float, weight_decay: float, *, decayed: bool) -> None:
        config = self._config
        pieces = [(shard, segment) for shard in self._shards for segment in shard.bucket.segments]
        adamw_(
            [shard.cut(segment) for shard, segment in pieces if segment.layout.decay == decayed],
            step=self.step_count,
            lr=lr,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_eps,
            weight_decay=weight_decay,
        )

    @torch.no_grad()
    def health(self) -> Tensor:
        """() float64: 0 when all that belongs to the optimizer alone is finite on this rank, else NaN."""
        # sums: several times faster on a CPU than the largest value, or than asking each number
        sums = [flat.sum().double() for shard in self._shards for flat in shard.kinds.values() if flat.numel()]
        if not sums:
            return torch.zeros((), dtype=torch.float64, device=self._buckets.device)
        return (torch.stack(sums) * 0.0).sum()

    def reset_masters(self) -> None:
        """Take the weights as they are for masters, after something else than `step` filled the parameters."""
        for shard in self._shards:
            shard.master.copy_(shard.bucket.own_weights)

    def blocks(self) -> list[Block]:
        """Views that a checkpoint keeps: "exp_avg/<name>", "exp_avg_sq/<name>" and, if separate, "master/<name>"."""
        found: list[Block] = []
        for shard in self._shards:
            for segment in shard.bucket.segments:
                primary = shard.bucket.speaks_for(segment.layout)
                for prefix, flat in shard.kinds.items():
                    found += segment.blocks(prefix, segment.of(flat), primary, self._state)
        return found

    def copies(self) -> list[Copy]:
        """The same, each parameter's as a whole, with the axes along which other ranks own the same numbers."""
        return [
            copy
            for shard in self._shards
            for prefix, flat in shard.kinds.items()
            for copy in copies_of(shard.bucket, prefix, flat, self._state)
        ]

    def state_dict(self) -> dict[str, int]:
        """What is the same on all ranks."""
        return {"step_count": self.step_count}

    def load_state_dict(self, values: dict[str, int]) -> None:
        """The inverse of `state_dict`; the tensors are filled through `blocks`."""
        self.step_count = values["step_count"]
