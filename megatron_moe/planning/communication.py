"""Bytes and calls of one training step, by axis, as functions of shapes; what a recorded step sends, exactly.

Words: B samples of a microbatch, S tokens of a sample, R = S/cp rows of a rank, T = R·B/tp tokens that it routes; H, D,
G, E, K as everywhere; e bytes of an activation, w of a wide number; P weights of a stage, n ranks of an axis. Into
products split by columns and out of those split by rows is a *crossing* of tp, forward and backward.

    axis                what                                                 bytes from one rank
    tp                  a crossing, with sequence parallelism or without     4·R·B·H·e·(n-1)/n
    tp                  the loss, on the last stage                          3·2·R·B·w·(n-1)/n
    cp                  an attention: keys and values, their gradients       2·R·B·2·(G/tp)·D·e·(n-1)
    ep                  an MoE layer: there and back, both passes            4·T·K·H·e·(n-1)/n
    etp                 an MoE layer: gathered and scattered, both passes    4·T·K·H·e·(n-1)
    pp, pp_wrap, back   a tensor between two stages (/tp: sequence parallel) R·B·H·e each
    tp_cp               a balance loss                                       2·groups·E·8·(n-1)/n
    tp_cp               places of experts, where there is a capacity         T·K·columns·8·(n-1)
    dp_cp, edp          dense and expert weights with ZeRO-1, once a step    P·(w+e)·(n-1)/n
    dp_cp, edp          without it                                           2·P·w·(n-1)/n
    tp, pp, embedding   gradients of what is replicated or tied, a shard     2·(P/shards)·w·(n-1)/n

All but the last three are of one microbatch. Beside them go the counts of tokens and rows, and once a step the norm,
the losses and the statistics: a few numbers. Rows of experts are those of an even load without drops. Each bucket of
gradients is padded to whole shards of 16 elements.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.models.build import gpt_spec, stage_parts
from megatron_moe.models.gpt import GPTSpec, GPTStage
from megatron_moe.models.transformer import LayerSpec
from megatron_moe.moe.methods import find_method
from megatron_moe.moe.routers.st_moe import STMoERouter
from megatron_moe.moe.routers.top_k import TopKRouter
from megatron_moe.parallel.collectives import shares
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of
from megatron_moe.parallel.recording import Tally
from megatron_moe.parallel.state import ParallelState
from megatron_moe.planning.account import Account

INTEGER, DOUBLE = 8, 8  # bytes
ALIGNMENT = 16  # elements, of parameters and of shards


@dataclass(frozen=True)
class Shapes:
    """What the formulas are functions of, on one rank."""

    spec: GPTSpec
    lengths: Mapping[str, int]  # tokens of a sample, by stream
    samples: int  # of a microbatch
    microbatches: int  # of this rank, in a step
    state: ParallelState

    @property
    def element(self) -> int:
        return self.spec.dtype.itemsize

    @property
    def wide(self) -> int:
        return torch.promote_types(self.spec.dtype, torch.float32).itemsize

    def rows(self, stream: str) -> int:
        return self.lengths[stream] // self.state.cp.size

    def hidden(self, stream: str) -> int:
        """Bytes of a whole hidden state of this context-parallel rank."""
        return self.rows(stream) * self.samples * self.spec.hidden_size * self.element

    def tokens(self, stream: str) -> int:
        """That this rank of tp routes, and keeps under sequence parallelism; the first ranks may have a row more."""
        return shares(self.rows(stream), self.state.tp.size)[self.state.tp.rank] * self.samples

    def share(self, stream: str) -> int:
        """Bytes of the hidden state of those."""
        return self.tokens(stream) * self.spec.hidden_size * self.element

    def kept(self, stream: str) -> int:
        """Bytes of the part that this rank keeps between products."""
        return self.share(stream) if self.spec.sequence_parallel else self.hidden(stream)


def step_traffic(
    config: RunConfig, grid: Grid, rank: int, vocab_size: int, lengths: Mapping[str, int] | None = None
) -> dict[str, Tally]:
    """What `rank` sends in one step, by axis; an axis along which nothing is sent is left out.

    lengths: tokens of a sample, by stream; None: as the data section says.   The first step also tells the other stages
    which statistics it brings, which is not counted.   Raises ConfigError for what there is no formula for.
    """
    shapes = shapes_of(config, grid, rank, vocab_size, lengths)
    _check(config, shapes)
    account = Account(shapes.state)
    parts = stage_parts(config)
    numbers = range(shapes.state.pp.rank, len(parts), shapes.state.pp.size)
    for number in numbers:
        for index in parts[number]:
            _layer(account, shapes, shapes.spec.layers[index], config)
        _ends(account, shapes, parts, number)
        _edges(account, shapes, parts, number)
    _gradients(account, shapes, [GPTStage(shapes.spec, parts, number, shapes.state) for number in numbers], config)
    _figures(account, shapes, [layer for number in numbers for layer in parts[number]])
    return account.tallies


def shapes_of(
    config: RunConfig, grid: Grid, rank: int, vocab_size: int, lengths: Mapping[str, int] | None = None
) -> Shapes:
    """Arguments as in step_traffic."""
    if lengths is None:
        lengths = {"decoder": config.data.decoder_length, "encoder": config.data.seq_length}
    state, _ = ParallelState.recorded(grid, rank)
    micro = config.training.micro_batch_size
    return Shapes(
        gpt_spec(config, vocab_size), lengths, micro, config.training.global_batch_size // (micro * grid.dp), state
    )


def _check(config: RunConfig, shapes: Shapes) -> None:
    parallel = config.parallel
    without = {
        "--recompute-granularity": parallel.recompute_granularity,
        "--moe-expert-rank-capacity-factor": parallel.expert_rank_capacity_factor,
        "--cross-entropy-chunk-size": parallel.cross_entropy_chunk_size,
        "--moe-consistency-coeff": config.moe.consistency_coeff,
        "--expert-model-parallel-ranks-per-node": parallel.expert_model_parallel_ranks_per_node,
        "--data-parallel-sharding-strategy": "optim_grads_params" if parallel.shards_parameters else None,
        "--tp-comm-overlap": parallel.tp_comm_overlap or None,
        "--cp-comm-type": None if parallel.cp_comm_type == "all_gather" else parallel.cp_comm_type,
    }
    for flag, value in without.items():
        if value is not None:
            raise ConfigError(f"{flag} {value}: there is no formula of what it sends; leave it out.")
    size = shapes.state.cp.size * shapes.state.tp.size
    uneven = [length for length in shapes.lengths.values() if length % size]
    if uneven and shapes.state.etp.size > 1:
        raise ConfigError(
            f"{uneven[0]} tokens of a sample are not the same number on all ranks, which the formula of what experts "
            f"split over --expert-tensor-parallel-size {shapes.state.etp.size} send wants; use a multiple of {size}."
        )
    for moe, _ in config.stacks:
        if moe.num_experts:
            _check_experts(moe)


def _check_experts(moe: MoEConfig) -> None:
    if not issubclass(find_method(moe.router_type), TopKRouter | STMoERouter):
        raise ConfigError(
            f"{moe.flag('router_type')} {moe.router_type}: there is no formula of what it sends; use top_k or st_moe."
        )
    if moe.token_dispatcher_type not in ("auto", "alltoall", "local") or moe.expert_dropout:
        raise ConfigError(
            f"{moe.flag('token_dispatcher_type')} {moe.token_dispatcher_type} with {moe.flag('expert_dropout')} "
            f"{moe.expert_dropout:g}: there is a formula for alltoall without dropout only."
        )


def _enter(account: Account, shapes: Shapes, stream: str) -> None:
    """Into products split by columns."""
    hidden, times = shapes.hidden(stream), shapes.microbatches
    if shapes.spec.sequence_parallel:
        account.all_gather("tp", shapes.kept(stream), times)
        account.reduce_scatter("tp", hidden, shapes.kept(stream), times)
    else:
        account.all_reduce("tp", hidden, times)  # of the gradient


def _leave(account: Account, shapes: Shapes, stream: str) -> None:
    """Out of products split by rows."""
    hidden, times = shapes.hidden(stream), shapes.microbatches
    if shapes.spec.sequence_parallel:
        account.reduce_scatter("tp", hidden, shapes.kept(stream), times)
        account.all_gather("tp", shapes.kept(stream), times)
    else:
        account.all_reduce("tp", hidden, times)


def _layer(account: Account, shapes: Shapes, layer: LayerSpec, config: RunConfig) -> None:
    stream = layer.stream
    _attention(account, shapes, layer, stream)
    if layer.cross_attention:
        _enter(account, shapes, "encoder")
        _attention(account, shapes, layer, "encoder", asked_by=stream)
    moe = layer.moe
    crossings = 1 if moe is None else (moe.extra_ffn != "none") + (moe.shared_expert_intermediate_size is not None)
    for _ in range(crossings):
        _enter(account, shapes, stream)
        _leave(account, shapes, stream)
    if moe is not None:
        _routing(account, shapes, moe, stream)
        _experts(account, shapes, moe, stream)


def _attention(account: Account, shapes: Shapes, layer: LayerSpec, keys: str, asked_by: str | None = None) -> None:
    """keys: the stream of keys and values.   asked_by: that of the queries, where it is another."""
    shape, times = layer.attention, shapes.microbatches
    stream = asked_by or keys
    _enter(account, shapes, stream)
    _leave(account, shapes, stream)
    heads = shape.num_groups // shapes.state.tp.size
    both = shapes.rows(keys) * shapes.samples * 2 * heads * shape.head_dim * shapes.element
    account.all_gather("cp", both, times)
    account.reduce_scatter("cp", both * shapes.state.cp.size, both, times)
    if shape.qk_norm == "projection":
        # sums of squares of queries and of keys, forward and backward
        for rows in (shapes.rows(stream), shapes.rows(keys)):
            account.all_reduce("tp", rows * shapes.samples * shapes.wide, 2 * times)


def _routing(account: Account, shapes: Shapes, moe: MoEConfig, stream: str) -> None:
    """What routers and limits ask of the other ranks that hold a part of a routing group."""
    times = shapes.microbatches
    if moe.aux_loss_coeff:
        groups = -(-shapes.samples // moe.routing_group_samples)
        account.all_reduce("tp_cp", groups * moe.num_experts * INTEGER, times)
    if moe.expert_capacity_factor is not None:
        # the bucket and the key of an assignment, and what it is sorted by before that
        columns = 2
        if moe.token_drop_policy == "probs":
            columns += 1
        else:
            columns += moe.slot_priority == "k_major" or moe.token_drop_policy == "bpr"
            columns += moe.token_drop_policy == "bpr"
        account.all_gather("tp_cp", INTEGER, times)
        account.all_gather("tp_cp", shapes.tokens(stream) * moe.router_topk * columns * INTEGER, times)


def _experts(account: Account, shapes: Shapes, moe: MoEConfig, stream: str) -> None:
    times, ep, etp = shapes.microbatches, shapes.state.ep.size, shapes.state.etp.size
    rows = shapes.tokens(stream) * moe.router_topk * shapes.spec.hidden_size * shapes.element
    if not shapes.spec.sequence_parallel:
        # tokens are split for routing, and their answers gathered; backward the other way round
        account.all_gather("tp", shapes.share(stream), 2 * times)
    if ep * etp == 1:
        return
    account.exchange("ep", moe.num_experts * INTEGER, times)  # how many rows will come
    account.all_gather("etp", moe.num_experts * INTEGER, times)
    account.exchange("ep", rows, 4 * times)
    account.all_gather("etp", rows, 2 * times)
    account.reduce_scatter("etp", rows * etp, rows, 2 * times)


def _ends(account: Account, shapes: Shapes, parts: Sequence[range], number: int) -> None:
    """Embeddings where streams begin, head and loss where the decoder ends."""
    encoder = shapes.spec.encoder_layers
    if number == 0:
        _leave(account, shapes, "encoder" if encoder else "decoder")
    if encoder and encoder in parts[number]:
        _leave(account, shapes, "decoder")
    if number == len(parts) - 1:
        _enter(account, shapes, "decoder")
        # the largest logit; sum of exponentials and chosen logit together
        tokens = shapes.rows("decoder") * shapes.samples
        account.all_reduce("tp", tokens * shapes.wide, shapes.microbatches)
        account.all_reduce("tp", 2 * tokens * shapes.wide, shapes.microbatches)


def _edges(account: Account, shapes: Shapes, parts: Sequence[range], number: int) -> None:
    """To the next stage, and gradients to the one before."""
    times = shapes.microbatches
    # from the last rank on to the first there are channels of their own
    onward = "pp_wrap" if shapes.state.pp.is_last else "pp"
    before = "pp_wrap" if shapes.state.pp.is_first else "pp"
    if number + 1 < len(parts):
        for sent in edge_bytes(shapes, parts[number + 1].start).values():
            account.pass_on(onward, sent, times)
            account.take(f"{onward}_back", times)
    if number:
        for sent in edge_bytes(shapes, parts[number].start).values():
            account.take(before, times)
            account.pass_on(f"{before}_back", sent, times)


def edge_bytes(shapes: Shapes, start: int) -> dict[str, int]:
    """Every tensor that a stage which begins with layer `start` is given, with its size."""
    encoder = shapes.spec.encoder_layers
    return {
        name: shapes.kept("encoder" if name == "memory" or start < encoder else "decoder")
        for name in shapes.spec.passed_on(start)
    }


def _gradients(account: Account, shapes: Shapes, stages: Sequence[GPTStage], config: RunConfig) -> None:
    """Each bucket's gradients to the owners of its shards, and the updated weights back."""
    sharded = config.parallel.shards_optimizer
    for bucket in _buckets(stages, config.parallel.ddp_bucket_size):
        layout = layout_of(bucket[0])
        size = shapes.state.axis(layout.reduce_over).size if sharded else 1
        elements = sum(_aligned(weight.numel()) for weight in bucket)
        shard = _aligned(-(-elements // size))
        narrow = bucket[0].dtype.itemsize
        wide = torch.promote_types(bucket[0].dtype, torch.float32).itemsize
        if sharded:
            account.reduce_scatter(layout.reduce_over, size * shard * wide, shard * wide)
            account.all_gather(layout.reduce_over, shard * narrow)
        else:
            account.all_reduce(layout.reduce_over, shard * wide)
        for axis in layout.sum_over:
            account.all_reduce(axis, shard * wide)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _buckets(stages: Sequence[GPTStage], most: int) -> list[list[nn.Parameter]]:
    """Each stage's weights that are reduced alike, at most so many elements at a time.

    What several stages of a rank have is one weight, of the first of them.
    """
    named = [(number, name, weight) for number, stage in enumerate(stages) for name, weight in stage.named_parameters()]
    often = Counter(name for _, name, _ in named)
    first = {name: number for number, name, _ in reversed(named)}
    alike: dict[tuple[object, ...], list[list[nn.Parameter]]] = {}
    for number, name, weight in named:
        if first[name] != number:
            continue
        layout = layout_of(weight)
        in_layer = name.startswith("layers.")
        kind = (number, layout.reduce_over, layout.sum_over, weight.dtype, often[name] > 1, in_layer)
        found = alike.setdefault(kind, [[]])
        filled = sum(_aligned(member.numel()) for member in found[-1])
        if filled and filled + weight.numel() > most:
            found.append([])
        found[-1].append(weight)
    return [bucket for found in alike.values() for bucket in found]


def _figures(account: Account, shapes: Shapes, layers: Sequence[int]) -> None:
    """Once a step: tokens to divide by, the norm, the loss, and what the routers tell."""
    streams = 2 if shapes.spec.encoder_layers else 1
    account.all_reduce("dp", (1 + 3 * streams) * DOUBLE)
    account.all_reduce("world", DOUBLE)
    account.all_reduce("world", 3 * DOUBLE)
    told = 0
    for moe in (shapes.spec.layers[index].moe for index in layers):
        if moe is not None:
            # asked and served, by expert; tokens, unserved ones, entropy, confidence; the losses
            told += 2 * moe.num_experts + 4 + bool(moe.aux_loss_coeff) + bool(moe.z_loss_coeff)
    account.all_reduce("stage", told * DOUBLE)
    account.all_gather("pp", told * DOUBLE)
