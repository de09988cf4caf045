"""From what a forward pass knows of its tokens to what routers may know of this rank's share of them."""

import torch
from torch import Tensor

from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.parallel.collectives import own_rows
from megatron_moe.parallel.state import Axis

# 2^32 positions in a sequence are room enough, and 2^29 samples in a run; the second pass has a bit of its own
_POSITION_BITS, _PASS_BIT = 32, 61


def token_info(ctx: ForwardContext, tp: Axis, layer: int, group_samples: int) -> TokenInfo:
    """What routers may know of the tokens of this rank: rows split over tp, position-major."""
    view = ctx.view
    rows = own_rows(view.rows, tp)
    samples = view.num_samples
    sample = torch.arange(samples, device=rows.device).expand(len(rows), samples)
    position = (rows + view.start)[:, None].expand_as(sample)
    padding = view.segments < 0
    group_of = _group_of(view, group_samples)
    num_groups = view.num_passes * -(-view.samples_of_a_pass // group_samples)
    per_sample = (~padding).sum(dim=0)
    group_tokens = torch.zeros(num_groups, dtype=torch.int64, device=rows.device).index_add_(0, group_of, per_sample)
    passes = torch.arange(samples, device=rows.device) // view.samples_of_a_pass
    sample_keys = view.sample_ids + (passes << (_PASS_BIT - _POSITION_BITS))
    return TokenInfo(
        ids=view.tokens[rows].flatten(),
        previous_ids=_previous_ids(view)[rows].flatten(),
        positions=position.flatten(),
        sequences=sample.flatten(),
        is_padding=padding[rows].flatten(),
        groups=group_of.expand_as(sample).flatten(),
        keys=(position * group_samples + sample % view.samples_of_a_pass % group_samples).flatten(),
        global_keys=((sample_keys << _POSITION_BITS) + position).flatten(),
        sample_keys=sample_keys.expand_as(sample).flatten(),
        passes=passes.expand_as(sample).flatten(),
        num_groups=num_groups,
        group_size=view.length * group_samples,
        group_tokens=group_tokens,
        sequence_tokens=per_sample,
        sequence_groups=group_of,
        sequence_keys=sample_keys,
        random=ctx.random.at(stream="router", layer=layer),
        train=ctx.train,
        start=view.start,
    )


def _group_of(view: SequenceView, group_samples: int) -> Tensor:
    """(B,) the routing group of each sample: consecutive ones share it, but not across passes."""
    sample = torch.arange(view.num_samples, device=view.tokens.device)
    groups_of_a_pass = -(-view.samples_of_a_pass // group_samples)
    in_pass = sample % view.samples_of_a_pass
    return sample // view.samples_of_a_pass * groups_of_a_pass + in_pass // group_samples


def _previous_ids(view: SequenceView) -> Tensor:
    """(S, B) the vocabulary id before each token in its own document; -1 where there is none."""
    before = view.tokens.roll(1, dims=0)
    same = view.segments == view.segments.roll(1, dims=0)
    same[0] = False
    found = before.where(same, -1)
    if view.before is not None:
        found[0] = view.before
    return found
