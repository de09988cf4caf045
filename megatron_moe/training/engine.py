"""Model, gradients, optimizer and pipeline of one rank: everything that a step of training needs, and no files."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_moe.config.errors import NonFiniteError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.stages import num_rounds, schedule_name
from megatron_moe.data.batch import Batch
from megatron_moe.layers.weight_gradients import collect_small_gradients
from megatron_moe.models.build import build_stages, embedding_places, gpt_spec, initialise_stages, stage_parts
from megatron_moe.models.gpt import GPTStage
from megatron_moe.moe.sparse_layer import SparseLayer
from megatron_moe.optim.clip import clip_
from megatron_moe.optim.fully_sharded import FullyShardedParameters, Sharder
from megatron_moe.optim.gradients import GradientBuckets
from megatron_moe.optim.lr_schedule import learning_rate
from megatron_moe.optim.owned import Gradients
from megatron_moe.optim.zero import ShardedAdamW
from megatron_moe.parallel.blocks import Block, module_blocks
from megatron_moe.parallel.copies import Copy, module_copies
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState
from megatron_moe.parallel.turns import Turns, yielding
from megatron_moe.pipeline.actions import Pipeline
from megatron_moe.pipeline.executor import Executor
from megatron_moe.pipeline.schedules import SCHEDULES, forward_only
from megatron_moe.pipeline.transfer import Transfer
from megatron_moe.training.faults import check_finite
from megatron_moe.training.metrics import LayerStats, MetricsReducer, StepMetrics
from megatron_moe.training.objective import Objective
from megatron_moe.training.probe import Probe, Watched
from megatron_moe.training.replay import found_text, verdict_of
from megatron_moe.training.replicas import ReplicaCheck
from megatron_moe.training.step import Counting, Findings, StepProgram, count_batches

logger = logging.getLogger(__name__)


def grid_of(config: RunConfig, world_size: int) -> Grid:
    """The grid that a configuration asks for in a world of so many ranks."""
    parallel = config.parallel
    return Grid(
        world_size,
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.context_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor,
        embedding_places=embedding_places(config),
        ep_ranks_per_node=parallel.expert_model_parallel_ranks_per_node,
        rounds=num_rounds(config.model, parallel),
    )


@dataclass(frozen=True)
class StepResult:
    """One finished step, the same on every rank."""

    metrics: StepMetrics
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class _Found:
    """A step before its update, the same on every rank."""

    metrics: StepMetrics
    norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.metrics.loss) and math.isfinite(self.norm)


def _no_judge(loss: float, norm: float) -> None:
    """Every update is made."""


class Engine:
    """This rank's part of the model and of its training."""

    def __init__(self, config: RunConfig, state: ParallelState, device: torch.device, vocab_size: int) -> None:
        """vocab_size: ids that mean something, before padding."""
        turns = Turns(device)
        state = replace(state, **{name: yielding(state.axis(name), turns) for name in ("ep", "ep_node", "ep_local")})
        self.config = config
        self.state = state
        self.device = device
        self.spec = gpt_spec(config, vocab_size)
        self._stages = build_stages(self.spec, state, stage_parts(config))
        self._sharded = self._shard() if config.parallel.shards_parameters else None
        self.buckets: Gradients = self._sharded or self._whole()
        for stage in self._stages:
            collect_small_gradients(stage)
        self.optimizer = ShardedAdamW(self.buckets, config.optimizer, overlap=config.parallel.gathers_beside_computing)
        self._replicas = ReplicaCheck(config.training.check_replicas_interval, self.copies, state, device)
        # told loss and gradient norm of each step before its update, which an error on all ranks prevents
        self.judge: Callable[[float, float], None] = _no_judge
        self._random = KeyedRandom(config.training.seed)
        self.objective = Objective.of(config.moe)
        num_sparse = sum(layer.moe is not None for layer in self.spec.layers)
        self._aux_share = 1.0 / max(1, num_sparse) if config.moe.aux_layer_reduction == "mean" else 1.0
        self._metrics = MetricsReducer(state, device)
        self._validation_metrics = MetricsReducer(state, device)
        # the executor numbers stages over the pipeline, the buckets over this rank
        self._executor = Executor(
            state.pp.size * len(self._stages),
            Transfer(state, device),
            complete=lambda stage: self.buckets.reduce(stage // state.pp.size),
            turns=turns,
        )

    def _whole(self) -> GradientBuckets:
        """First weights, whole on every rank, and their gradients."""
        initialise_stages(self._stages, self.state, self.config.training.seed, self.device)
        return GradientBuckets(
            [list(stage.named_parameters()) for stage in self._stages],
            self.state,
            bucket_elements=self.config.parallel.ddp_bucket_size,
            sharded=self.config.parallel.shards_optimizer,
            overlap=self.config.parallel.overlap_grad_reduce,
        )

    def _shard(self) -> FullyShardedParameters:
        """First weights, this rank's part of them, and its gradients."""
        sharder = Sharder(self.state, self.device)
        initialise_stages(self._stages, self.state, self.config.training.seed, self.device, sharder)
        (stage,) = self._stages
        return FullyShardedParameters(
            stage,
            sharder.parameters,
            self.state,
            self.device,
            bucket_elements=self.config.parallel.ddp_bucket_size,
        )

    @property
    def stages(self) -> list[GPTStage]:
        """This rank's stages, their weights whole."""
        self.buckets.settle()
        return self._stages

    @property
    def modules(self) -> list[nn.Module]:
        return list(self.stages)

    def train_step(self, step: int, batches: Sequence[Batch], last_checkpoint: str | None = None) -> StepResult:
        """Forward, backward, reduce, clip, update.

        step: number of finished steps before this one.  batches: this rank's microbatches of the global batch.
        Raises on every rank, before anything is updated: NonFiniteError when a loss or gradient is NaN or infinite,
        ReplicaError when copies differ.
        """
        training = self.config.training
        for layer in self._moe_layers().values():
            layer.before_step(step / training.num_steps)
        found, findings = self._gradients(step, batches)
        self._replicas.check(step + 1, last_checkpoint, suspect=not found.finite)
        if training.check_for_nan_in_loss_and_grad and not found.finite:
            local = findings.loss
            healthy = local is None or bool(local.isfinite())
            found = self._again(step, batches, found, healthy, last_checkpoint)
        self.judge(found.metrics.loss, found.norm)
        rate = learning_rate(self.config.optimizer, step, training.num_steps)
        self.optimizer.step(rate)
        self._after_step(found.metrics.layers)
        return StepResult(found.metrics, found.norm, rate)

    def _gradients(self, step: int, batches: Sequence[Batch], probe: Probe | None = None) -> tuple[_Found, Findings]:
        """Everything of a step but its update.   probe: looks on."""
        program, counts = self._program(batches, self._random.at(step=step), self.objective, train=True)
        self.buckets.zero_()
        schedule = SCHEDULES[schedule_name(self.config.model, self.config.parallel)](self._pipeline(len(batches)))
        played = program if probe is None else Watched(program, probe)
        self._executor.train(schedule[self.state.pp.rank], played)
        self.buckets.reduce()
        norm = clip_(self.buckets, self.config.optimizer.clip_grad, self._health(program.findings))
        return _Found(self._metrics.reduce(program.findings, counts.result), norm), program.findings

    def _health(self, findings: Findings) -> Tensor | None:
        """() float64 that travels with the norm: NaN for what neither loss nor gradients tell."""
        if not self.config.training.check_for_nan_in_loss_and_grad:
            return None
        health = self.optimizer.health()
        # of the copies on the ranks of tp, one is reported
        return health if findings.loss is None else health + findings.loss.double() * 0.0

    def _again(
        self, step: int, batches: Sequence[Batch], first: _Found, healthy: bool, last_checkpoint: str | None
    ) -> _Found:
        """The step once more, watched. Returns it if it is finite now, else raises NonFiniteError on all ranks."""
        probe = Probe(self.state, [batch.sample_ids.tolist() for batch in batches], self.device)
        probe.look_at_state([*self.weight_blocks(), *self.optimizer.blocks()])
        with probe.watching(self._stages):
            again, _ = self._gradients(step, batches, probe)
        probe.look_at_gradients(self.buckets)
        places = probe.told()
        verdict = verdict_of((first.metrics.loss, first.norm), (again.metrics.loss, again.norm))
        text = found_text(verdict, places)
        world = self.state.world
        try:
            check_finite(first.metrics.loss, first.norm, healthy, step + 1, world, self.device, last_checkpoint, text)
        except NonFiniteError as error:
            if verdict != "transient":
                raise
            logger.warning("%s The run goes on with the second result.", error)
        return again

    def evaluate(self, batches: Sequence[Batch]) -> tuple[StepMetrics, float]:
        """The metrics of one global batch without learning from it, and over how many tokens its loss is the mean."""
        program, counts = self._program(batches, self._random, Objective(), train=False)
        schedule = forward_only(self._pipeline(len(batches)))
        self._executor.evaluate(schedule[self.state.pp.rank], program)
        if self._sharded is not None:
            self._sharded.rest()
        return self._validation_metrics.reduce(program.findings, counts.result), counts.result.loss_tokens

    def _pipeline(self, microbatches: int) -> Pipeline:
        group = self.config.parallel.microbatch_group_size_per_virtual_pipeline_stage
        return Pipeline(self.state.pp.size, microbatches, len(self._stages), group)

    def weight_blocks(self) -> list[Block]:
        """What a checkpoint keeps of the model; to read."""
        if self._sharded is not None:
            return self._sharded.weight_blocks()
        return module_blocks(self.stages, self.state)

    def copies(self) -> list[Copy]:
        """What of the weights, remembered states and optimizer states other ranks must hold too; to read."""
        weights = module_copies(self.stages, self.state) if self._sharded is None else self._sharded.weight_copies()
        return weights + self.optimizer.copies()

    def fill_weights(self, fill: Callable[[list[Block]], object]) -> None:
        """Let `fill` write the model's weights and remembered states; the optimizer goes on from them."""
        if self._sharded is not None:
            self._sharded.fill_weights(fill)
        else:
            fill(module_blocks(self.stages, self.state))
        self.optimizer.reset_masters()

    def _program(
        self, batches: Sequence[Batch], random: KeyedRandom, objective: Objective, *, train: bool
    ) -> tuple[StepProgram, Counting]:
        groups = {"decoder": self.config.moe.routing_group_samples}
        if self.spec.encoder_layers:
            groups["encoder"] = self.config.encoder_moe.routing_group_samples
        counts = count_batches(batches, groups, objective.num_passes, self.state, self.device, self.spec.encoder_layers)
        program = StepProgram(
            self._stages,
            batches,
            counts,
            self.state,
            random,
            self.device,
            train=train,
            objective=objective,
            aux_share=self._aux_share,
            chunk=self.config.parallel.cross_entropy_chunk_size,
            await_weights=self.buckets.await_weights,
            layer_done=lambda stage, layer: self.buckets.layer_done(stage // self.state.pp.size, layer),
            # what is sharded is reduced as autograd delivers it
            uses_sinks=self._sharded is None,
        )
        return program, counts

    def _moe_layers(self) -> dict[int, SparseLayer]:
        return {index: layer for stage in self._stages for index, layer in stage.moe_layers().items()}

    def _after_step(self, layers: LayerStats) -> None:
        if not layers:
            return
        names = set.intersection(*(set(stats) for stats in layers.values()))
        model = {
            name: torch.stack([stats[name] for stats in layers.values()]).sum(dim=0)
            for name in names
            if len({stats[name].shape for stats in layers.values()}) == 1
        }
        for index, layer in self._moe_layers().items():
            layer.after_step(layers[index], model)
