"""How the ranks share the work: world = pp x dp x cp x tp, and over the same ranks pp x edp x ep x etp."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import check_values, option

RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work; none of it changes what is computed."""

    flag_prefix: ClassVar[str] = ""

    tensor_model_parallel_size: int = option(1, "ranks that split each weight matrix (tp)", at_least=1)
    pipeline_model_parallel_size: int = option(1, "ranks that split the layers (pp)", at_least=1)
    context_parallel_size: int = option(1, "ranks that split each sequence (cp)", at_least=1)
    cp_comm_type: str = option(
        "all_gather",
        "how the ranks of a sequence attend: all_gather = keys and values of all in each; p2p = they go round the "
        "ranks (ring); a2a = each has some heads over the whole sequence",
        choices=("all_gather", "p2p", "a2a"),
    )
    expert_model_parallel_size: int = option(
        1, "ranks that share the experts of a layer (ep); folded over tp, cp and dp", at_least=1
    )
    expert_tensor_parallel_size: int | None = option(
        None, "ranks that split each expert's matrices (etp); none = as tp", at_least=1
    )
    expert_model_parallel_ranks_per_node: int | None = option(
        None,
        "ranks of ep that stand in one node (GPUs of a node / etp): a token crosses to each node that holds any of its "
        "experts once, and goes to their ranks from there; none = nodes are not told apart",
        at_least=1,
    )
    expert_rank_capacity_factor: float | None = option(
        None,
        "most rows that a rank of experts receives at once, in shares of an even split; more come in further rounds, "
        "of which nothing is kept for the backward pass; none = any number at once",
        flag="--moe-expert-rank-capacity-factor",
        at_least=1,
    )
    fallback_layouts: tuple[str, ...] = option(
        (),
        "layouts for a job that comes back on fewer ranks, best first, such as tp=2,ep=4 ep=2 (of tp, pp, cp, ep, etp; "
        "those not named are 1): the first that fits is used where the given one does not; none given = end with 2",
    )
    sequence_parallel: bool | None = option(
        None, "keep the hidden state split over tp along the sequence; none = whenever tp > 1"
    )
    tp_comm_overlap: bool = option(
        False,
        "let gathers and sums over tp travel beside the products that use or make them, in pieces; under sequence "
        "parallelism also keeps each rank's own rows only, and gathers them again in the backward pass",
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None,
        "layers of a stage, of which each pipeline rank then has several; none = as --num-virtual-stages-per-"
        "pipeline-rank says",
        at_least=1,
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None,
        "stages of each pipeline rank, far apart in the model: less idle time, more transfers; none = 1",
        at_least=1,
    )
    microbatch_group_size_per_virtual_pipeline_stage: int | None = option(
        None,
        "of several stages a rank: micro-batches that pass one before the rank turns to its next; none = as many as "
        "there are pipeline ranks",
        at_least=1,
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "what each stage holds, such as Ett|(ttt|)*6tt|L: E embedding, t decoder layer, e encoder layer, L loss; "
        "several stages a rank when there are more than ranks; none = even stages",
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first pipeline rank; none = as the others", at_least=1
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "layers of the last pipeline rank; none = as the others", at_least=1
    )
    account_for_embedding_in_pipeline_split: bool = option(
        False, "the first stage has one layer less, as if the embedding were one"
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "the last stage has one layer less, as if head and loss were one"
    )
    pipeline_schedule: str | None = option(
        None,
        "order of the micro-batches: sequential = one at a time (least memory, stages mostly idle), 1f1b, 1f1b_split = "
        "with the backward pass in two halves, interleaved = of several stages a rank, zb_h1 = halves moved to where "
        "the rank would be idle, 1f1b_overlap = one micro-batch computes while another's tokens travel; none = "
        "interleaved where ranks have several stages, else 1f1b",
        choices=("sequential", "1f1b", "1f1b_split", "interleaved", "zb_h1", "1f1b_overlap"),
        shortcuts={"--overlap-moe-expert-parallel-comm": "1f1b_overlap"},
    )
    recompute_granularity: str | None = option(
        None,
        "full = keep only the input of each layer, and run the layer again in the backward pass; selective = run only "
        "--recompute-modules again; none = keep all",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        None,
        "of full: uniform = all layers, --recompute-num-layers at a time; block = the first so many of each stage; "
        "none = uniform",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(
        None, "of full: layers that share one kept input, or layers of each stage; none = 1", at_least=1
    )
    recompute_modules: tuple[str, ...] = option(
        (),
        "of selective: core_attn, layernorm, mlp (dense), moe (whole sparse layer), moe_act (activation of experts); "
        "none given = core_attn",
    )
    cross_entropy_chunk_size: int | None = option(
        None,
        "tokens of a micro-batch whose logits are in memory at once in training; their products are computed again in "
        "the backward pass; none = all, kept",
        at_least=1,
    )
    data_parallel_sharding_strategy: str | None = option(
        None,
        "what data-parallel ranks split among them: no_shard = nothing; optim = the optimizer's state (ZeRO-1); "
        "optim_grads_params = gradients and weights too (ZeRO-3); none = optim",
        choices=("no_shard", "optim", "optim_grads_params"),
    )
    use_distributed_optimizer: bool | None = option(
        None, "on = --data-parallel-sharding-strategy optim, or more; off = no_shard; none = as that one says"
    )
    ddp_bucket_size: int = option(40_000_000, "gradients are reduced in buckets of about so many elements", at_least=1)
    overlap_grad_reduce: bool = option(
        True, "sum a bucket's gradients over the data-parallel ranks while the backward pass goes on"
    )
    overlap_param_gather: bool = option(
        True, "gather updated weights while the next step begins, each layer's until it is run"
    )
    distributed_backend: str = option("auto", "auto = nccl on GPUs, gloo on CPUs", choices=("auto", "nccl", "gloo"))
    distributed_timeout_minutes: float = option(
        10.0, "a collective that takes longer ends the run, in minutes", above=0
    )
    hang_timeout_s: float | None = option(
        480.0,
        "a rank that makes no progress for so many seconds while training or evaluating hangs: the run ends with exit "
        "code 87, the culprit's name and the stacks of all ranks; none = hangs are not looked for, anywhere",
        above=0,
    )
    hang_timeout_outside_steps_s: float = option(
        1800.0, "the same in seconds at start-up, while loading and while saving", above=0
    )
    straggler_factor: float | None = option(
        1.2,
        "a rank that computes so many times as long per step as the others of its pipeline stage is named in the log; "
        "none = slow ranks are not looked for",
        above=1,
    )
    debug_collectives: bool = option(
        False,
        "before each collective and message the ranks compare what they are about to do and from which line: a mistake "
        "ends the run with exit code 86 and names the rank; slow",
    )

    def __post_init__(self) -> None:
        check_values(self)
        split = self.use_distributed_optimizer
        if split is not None and split != self.shards_optimizer:
            flag = "--use-distributed-optimizer" if split else "--no-use-distributed-optimizer"
            raise ConfigError(
                f"{flag} contradicts --data-parallel-sharding-strategy {self.data_parallel_sharding_strategy}; "
                f"leave it out."
            )

    @property
    def shards_optimizer(self) -> bool:
        """Whether data-parallel ranks split the optimizer's state."""
        if self.data_parallel_sharding_strategy is None:
            return self.use_distributed_optimizer is not False
        return self.data_parallel_sharding_strategy != "no_shard"

    @property
    def shards_parameters(self) -> bool:
        """Whether they split the weights and gradients too."""
        return self.data_parallel_sharding_strategy == "optim_grads_params"

    @property
    def modules_to_recompute(self) -> frozenset[str]:
        """Those that run again in the backward pass, with selective recomputation."""
        if self.recompute_granularity != "selective":
            return frozenset()
        return frozenset(self.recompute_modules or ("core_attn",))

    @property
    def expert_tensor(self) -> int:
        """Ranks that split each expert's matrices (etp)."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def gathers_beside_computing(self) -> bool:
        """Whether a step may return before all weights have been gathered."""
        return self.overlap_param_gather and self.shards_optimizer

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether the hidden state is split over tp along the sequence."""
        if self.sequence_parallel is None:
            return self.tensor_model_parallel_size > 1
        return self.sequence_parallel

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense model and one sequence: tp x cp x pp."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the dense model in a world of so many ranks (dp)."""
        return world_size // self.model_parallel_size

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Copies of each expert in a world of so many ranks (edp)."""
        stage = world_size // self.pipeline_model_parallel_size
        return stage // (self.expert_model_parallel_size * self.expert_tensor)
