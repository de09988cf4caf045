"""What sections demand of each other, checked once, before any rank starts. Each error says the way out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from megatron_moe.config.data import DataConfig
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.parallel import RECOMPUTE_MODULES
from megatron_moe.config.pipeline import check_pipeline
from megatron_moe.config.sections import Sections
from megatron_moe.config.span_lengths import fits, raw_length
from megatron_moe.config.stages import num_rounds


def check_relations(run: Sections) -> None:
    """Raise ConfigError for the first relation between sections that does not hold."""
    for check in CHECKS:
        check(run)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def words(values: Iterable[int], last: str = "or") -> str:
    """ "1, 2 or 4"; of many, the first few and the last."""
    listed = [str(value) for value in values]
    if len(listed) > 12:
        listed = [*listed[:10], "...", listed[-1]]
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} {last} {listed[-1]}"


def _must_divide(flag: str, number: int, by_flag: str, size: int, name: str) -> None:
    """`number` must be a multiple of `size`."""
    if number % size:
        raise ConfigError(
            f"{flag} {number} cannot be split over {by_flag} {size}; "
            f"use a multiple of {size}, or {name} size of {words(divisors(number))}."
        )


def _vocabulary(run: Sections) -> None:
    if run.data.tokenizer_type == "NullTokenizer" and run.model.vocab_size is None:
        raise ConfigError(
            "--tokenizer-type NullTokenizer knows no vocabulary; give --vocab-size, or the tokenizer of the corpus "
            "with --tokenizer-type and --tokenizer-model."
        )
    extra = run.data.vocab_extra_ids if run.data.objective == "span_corruption" else 0
    if run.model.vocab_size is not None and run.model.vocab_size <= extra:
        raise ConfigError(
            f"--vocab-size {run.model.vocab_size} leaves no id to the text beside the sentinels of span corruption, "
            f"--vocab-extra-ids {extra}; give the ids of the text and the sentinels together."
        )


def _tensor(run: Sections) -> None:
    model, flag = run.model, "--tensor-model-parallel-size"
    size = run.parallel.tensor_model_parallel_size
    if model.num_query_groups is None:
        _must_divide("--num-attention-heads", model.num_attention_heads, flag, size, "a tensor")
    else:
        _must_divide("--num-query-groups", model.groups, flag, size, "a tensor")
    if not all(all(moe.moe_layers(layers)) and moe.extra_ffn == "none" for moe, layers in run.stacks):
        name = "--ffn-hidden-size" if model.ffn_hidden_size else "--ffn-hidden-size (4 x hidden size)"
        _must_divide(name, model.ffn_size, flag, size, "a tensor")
    for moe, _ in run.stacks:
        if moe.shared_expert_intermediate_size is not None:
            width = moe.shared_expert_intermediate_size
            _must_divide(moe.flag("shared_expert_intermediate_size"), width, flag, size, "a tensor")
    _must_divide("--make-vocab-size-divisible-by", model.make_vocab_size_divisible_by, flag, size, "a tensor")
    if run.parallel.sequence_parallel and size == 1:
        raise ConfigError(
            "--sequence-parallel has no effect with --tensor-model-parallel-size 1; leave it out (it is on by itself "
            "whenever the tensor size is above 1)."
        )


def _context(run: Sections) -> None:
    """All-to-all attention shares out heads over cp; key-value groups may be copied, heads not cut."""
    parallel = run.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads = run.model.num_attention_heads // tp
    if parallel.cp_comm_type != "a2a" or heads % cp == 0:
        return
    of_a_rank = f" / --tensor-model-parallel-size {tp} = {heads} heads" if tp > 1 else ""
    raise ConfigError(
        f"--num-attention-heads {run.model.num_attention_heads}{of_a_rank} cannot be shared out over "
        f"--context-parallel-size {cp} by --cp-comm-type a2a; use a context size of {words(divisors(heads))}, or "
        f"--cp-comm-type p2p or all_gather, which leave the heads where they are."
    )


def _sharding(run: Sections) -> None:
    parallel = run.parallel
    if not parallel.shards_parameters:
        return
    flag = "--data-parallel-sharding-strategy optim_grads_params"
    if parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"{flag} cannot be combined with --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size}: a stage would gather its weights again for every micro-batch in "
            f"flight; use optim, or one stage."
        )
    if num_rounds(run.model, parallel) > 1:
        raise ConfigError(f"{flag} shards one stage as a whole, and a rank has several; use optim, or one stage.")
    if parallel.debug_collectives:
        raise ConfigError(
            f"--debug-collectives cannot look at what {flag} sends, through PyTorch's FSDP; use optim, or leave it out."
        )
    if parallel.pipeline_schedule in ("1f1b_split", "zb_h1", "1f1b_overlap"):
        raise ConfigError(
            f"{flag} reduces weight gradients within the backward pass, which --pipeline-schedule "
            f"{parallel.pipeline_schedule} puts off; leave the schedule out."
        )


def _objective(run: Sections) -> None:
    data = run.data
    if data.objective != "span_corruption":
        return
    if not run.model.encoder_num_layers:
        raise ConfigError(
            "--objective span_corruption needs an encoder to read the corrupted text; give --encoder-num-layers."
        )
    shares = (data.noise_density, data.mean_noise_span_length)
    length = raw_length(data.seq_length, *shares)
    spans = round(round(length * data.noise_density) / data.mean_noise_span_length)
    if not fits(length, *shares):
        found, way_out = ("leaves no kept token before each span", "lengthen the spans, or cut out less")
        if not spans:
            found, way_out = ("makes no span", "shorten the spans, or cut out more")
        raise ConfigError(
            f"--seq-length {data.seq_length} with --noise-density {data.noise_density:g} and --mean-noise-span-length "
            f"{data.mean_noise_span_length:g} {found}; lengthen the sequence, {way_out}."
        )
    if spans > data.vocab_extra_ids:
        raise ConfigError(
            f"--vocab-extra-ids {data.vocab_extra_ids} are fewer than the {spans} spans of a sample; raise it to that, "
            f"shorten --seq-length, or lengthen --mean-noise-span-length."
        )


def _sequence(run: Sections) -> None:
    _length(run, "--seq-length", run.data.seq_length)
    if run.data.objective == "span_corruption":
        _targets(run.data, 2 * run.parallel.context_parallel_size)
        _length(run, "the length of the targets, which follows from --seq-length,", run.data.decoder_length)


def _targets(data: DataConfig, pieces: int) -> None:
    """The targets' length follows from --seq-length, so the way out is another one of those."""
    if pieces == 2 or data.decoder_length % pieces == 0:
        return
    longer = (replace(data, seq_length=data.seq_length + pieces * step) for step in range(1, 200))
    found = next((f"--seq-length {other.seq_length}" for other in longer if other.decoder_length % pieces == 0), None)
    raise ConfigError(
        f"--seq-length {data.seq_length} makes targets of {data.decoder_length} tokens, which cannot be cut into "
        f"2 x --context-parallel-size {pieces // 2} equal pieces; use {found or 'another --noise-density'}."
    )


def _length(run: Sections, flag: str, length: int) -> None:
    parallel = run.parallel
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    longest = run.model.max_position_embeddings
    if longest is not None and length > longest:
        raise ConfigError(
            f"{flag} {length} is longer than --max-position-embeddings {longest}; shorten the one or raise the other."
        )
    if cp > 1 and length % (2 * cp):
        raise ConfigError(
            f"{flag} {length} cannot be cut into 2 x --context-parallel-size {cp} equal pieces; "
            f"use a multiple of {2 * cp}, such as {-(-length // (2 * cp)) * 2 * cp}."
        )
    if length // cp < tp:
        raise ConfigError(
            f"{flag} {length} leaves {length // cp} tokens to each of --context-parallel-size {cp}, too few for "
            f"--tensor-model-parallel-size {tp}; use {tp * cp} tokens or more."
        )


def _experts(run: Sections) -> None:
    parallel = run.parallel
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor
    if not any(moe.num_experts for moe, _ in run.stacks):
        if parallel.expert_rank_capacity_factor is not None:
            raise ConfigError(
                "--moe-expert-rank-capacity-factor has no effect with --num-experts 0 (a dense model); leave it out, "
                "or give --num-experts."
            )
        if ep > 1 or parallel.expert_tensor_parallel_size is not None:
            flag = "--expert-model-parallel-size" if ep > 1 else "--expert-tensor-parallel-size"
            raise ConfigError(
                f"{flag} {ep if ep > 1 else etp} has no effect with --num-experts 0 (a dense model); "
                f"leave it out, or give --num-experts."
            )
        return
    factor = parallel.expert_rank_capacity_factor
    if factor is not None and ep == 1:
        raise ConfigError(
            f"--moe-expert-rank-capacity-factor {factor:g} has no effect with --expert-model-parallel-size 1, where "
            f"the one rank has all rows; leave it out."
        )
    for moe, layers in run.stacks:
        if moe.num_experts:
            _experts_of(moe, layers, run)


def _experts_of(moe: MoEConfig, layers: int, run: Sections) -> None:
    """Of one stack."""
    parallel = run.parallel
    if not any(moe.moe_layers(layers)):
        raise ConfigError(
            f"{moe.flag('layer_freq')} {moe.layer_freq} makes none of {moe.layers_flag} {layers} sparse, so that "
            f"{moe.flag('num_experts')} {moe.num_experts} has no effect; use a number up to {layers}, or leave out "
            f"the experts."
        )
    ep = parallel.expert_model_parallel_size
    _must_divide(moe.flag("num_experts"), moe.num_experts, "--expert-model-parallel-size", ep, "an expert")
    explicit = parallel.expert_tensor_parallel_size is not None
    flag = "--expert-tensor-parallel-size" if explicit else "--tensor-model-parallel-size"
    width = moe.expert_ffn_size(run.model.ffn_size)
    name = moe.flag("ffn_hidden_size") + ("" if moe.ffn_hidden_size else " (as --ffn-hidden-size)")
    _must_divide(name, width, flag, parallel.expert_tensor, "an expert tensor" if explicit else "a tensor")


def _dispatch(run: Sections) -> None:
    ep, etp = run.parallel.expert_model_parallel_size, run.parallel.expert_tensor
    local = [moe for moe, _ in run.stacks if moe.num_experts and moe.token_dispatcher_type == "local"]
    if local and ep * etp > 1:
        raise ConfigError(
            f"{local[0].flag('token_dispatcher_type')} local moves nothing between ranks, but the experts are split "
            f"over {ep * etp} (expert size {ep} x expert tensor size {etp}); use auto, or set both sizes to 1."
        )
    per_node, flag = run.parallel.expert_model_parallel_ranks_per_node, "--expert-model-parallel-ranks-per-node"
    if per_node is not None:
        _must_divide("--expert-model-parallel-size", ep, flag, per_node, "a node")
    by_node = [moe for moe, _ in run.stacks if moe.num_experts and moe.token_dispatcher_type == "hierarchical"]
    if by_node and ep > 1 and per_node is None:
        raise ConfigError(
            f"{by_node[0].flag('token_dispatcher_type')} hierarchical must know which ranks share a node; give {flag} "
            f"(GPUs of a node / expert tensor size: {words(divisors(ep))}), or use one_per_rank."
        )


def _routing_groups(run: Sections) -> None:
    micro = run.training.micro_batch_size
    for moe, _ in run.stacks:
        samples = moe.routing_group_samples
        if moe.num_experts and micro % samples:
            raise ConfigError(
                f"--micro-batch-size {micro} does not hold whole routing groups of "
                f"{moe.flag('routing_group_samples')} {samples}; "
                f"use a multiple of {samples}, or groups of {words(divisors(micro))}."
            )


def _recomputation(run: Sections) -> None:
    parallel = run.parallel
    unknown = [name for name in parallel.recompute_modules if name not in RECOMPUTE_MODULES]
    if unknown:
        raise ConfigError(f"--recompute-modules {unknown[0]}: expected one or more of {', '.join(RECOMPUTE_MODULES)}.")
    sparse = [all_sparse for moe, layers in run.stacks for all_sparse in moe.moe_layers(layers)]
    dense_parts = not all(sparse) or any(moe.extra_ffn != "none" for moe, _ in run.stacks)
    idle = {
        "moe": (not any(sparse), "without experts"),
        "moe_act": (not any(sparse), "without experts"),
        "mlp": (not dense_parts, "when every layer is sparse"),
        "layernorm": (
            parallel.uses_sequence_parallel and not parallel.tp_comm_overlap,
            "with sequence parallelism and without --tp-comm-overlap, for what is kept is gathered from all ranks",
        ),
    }
    for name in parallel.modules_to_recompute:
        has_none, because = idle.get(name, (False, ""))
        if has_none:
            raise ConfigError(f"--recompute-modules {name} has no effect {because}; leave it out.")


def _learning_rate(run: Sections) -> None:
    optimizer = run.optimizer
    end, warmup = optimizer.decay_steps(run.training.num_steps), optimizer.lr_warmup_iters
    flag = "--lr-decay-iters" if optimizer.lr_decay_iters else "the run's steps,"
    if warmup > end:
        raise ConfigError(f"--lr-warmup-iters {warmup} is more than {flag} {end}; warm up for {end} steps or fewer.")
    last = optimizer.lr_wsd_decay_iters or 0
    if optimizer.lr_decay_style == "WSD" and warmup + last > end:
        raise ConfigError(
            f"--lr-wsd-decay-iters {last} after --lr-warmup-iters {warmup} is more than {flag} {end}; "
            f"shorten them to {end} steps together."
        )


CHECKS = (
    _vocabulary,
    _tensor,
    _context,
    check_pipeline,
    _sharding,
    _objective,
    _sequence,
    _experts,
    _dispatch,
    _routing_groups,
    _recomputation,
    _learning_rate,
)
