"""ZeRO-3 in whole steps: what lasts between them, in which precision, and checkpoints that any other layout reads."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from megatron_moe.certify.layouts import CP, EP, ETP, TP, ZERO_3
from megatron_moe.certify.tiny_model import GLOBAL_BATCH, VOCAB, samples, tiny_config
from megatron_moe.data.batch import Batch
from megatron_moe.layers.attention import Attention
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.gpt import GPTStage
from megatron_moe.models.transformer import TransformerLayer
from megatron_moe.optim.fully_sharded import Sharder, Unit
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine, grid_of
from tests.end_to_end.tiny_job import Step, attempt, job, read_steps, write_corpus

MOE = {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0}


def engine_of(
    parallel: Mapping[str, Any], world_size: int, dtype: str = "fp64", moe: Mapping[str, Any] = MOE
) -> Engine:
    config = tiny_config(moe, parallel, {}, dtype=dtype)
    return Engine(config, ParallelState.distributed(grid_of(config, world_size)), torch.device("cpu"), VOCAB)


def batches_of(engine: Engine) -> list[Batch]:
    dp = engine.state.dp
    return [samples([number]) for number in range(dp.rank, GLOBAL_BATCH, dp.size)]


def held(engine: Engine) -> int:
    """Elements of weights that this rank holds now; a module that was left gathered has whole ones."""
    parameters = engine.stages[0].parameters()
    return sum((own.to_local() if isinstance(own, DTensor) else own).numel() for own in parameters)


def live_bytes() -> int:
    """Of all float64 tensors that anybody in this process keeps."""
    gc.collect()
    # their types are asked for, because some objects of torch warn when they are asked for their class
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {found.untyped_storage().data_ptr(): found for found in tensors if found.dtype == torch.float64}
    return sum(found.untyped_storage().nbytes() for found in storages.values())


def elements_held(rank: int, world_size: int, parallel: Mapping[str, Any]) -> list[int]:
    """At the start, after a forward pass alone, and after a step."""
    engine = engine_of(parallel, world_size)
    found = [held(engine)]
    engine.evaluate(batches_of(engine))
    found.append(held(engine))
    engine.train_step(0, batches_of(engine))
    return [*found, held(engine)]


def bytes_held(rank: int, world_size: int, parallel: Mapping[str, Any]) -> int:
    """After both kinds of pass: weights, gradients, moments, and whatever else was left."""
    before = live_bytes()
    engine = engine_of(parallel, world_size)
    engine.train_step(0, batches_of(engine))
    engine.evaluate(batches_of(engine))
    return live_bytes() - before


def test_between_passes_a_rank_holds_its_part_of_the_weights_and_no_more() -> None:
    whole = run_on_ranks(2, elements_held, {CP: 2})[0]
    first, second = run_on_ranks(2, elements_held, {CP: 2, **ZERO_3})
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 0.01 * whole[0]


def test_gradients_and_moments_are_split_too() -> None:
    whole = run_on_ranks(2, bytes_held, {"data_parallel_sharding_strategy": "no_shard"})
    for sharded in run_on_ranks(2, bytes_held, ZERO_3):
        assert sharded < 0.55 * min(whole)


def losses_of(engine: Engine) -> list[float]:
    """Of steps with evaluation before, between and after them."""
    found = []
    for step in range(2):
        found.append(engine.evaluate(batches_of(engine))[0].loss)
        found.append(engine.train_step(step, batches_of(engine)).metrics.loss)
    return [*found, engine.evaluate(batches_of(engine))[0].loss]


def evaluated(rank: int, world_size: int, parallel: Mapping[str, Any]) -> list[float]:
    return losses_of(engine_of(parallel, world_size))


@pytest.mark.parametrize("chunk", [None, 3], ids=["all logits at once", "logits outside of the forward pass"])
def test_evaluation_and_steps_see_each_others_weights(chunk: int | None) -> None:
    parallel = {**ZERO_3, "cross_entropy_chunk_size": chunk}
    whole = Engine(tiny_config(MOE, {}, {}), ParallelState.alone(), torch.device("cpu"), VOCAB)
    expected = losses_of(whole)
    for found in run_on_ranks(2, evaluated, parallel):
        assert found == pytest.approx(expected, rel=1e-9)


def gathered_at_once(rank: int, world_size: int) -> list[list[str]]:
    """Which layers are whole whenever the attention of one begins, in training and in evaluation."""
    engine = engine_of(ZERO_3, world_size)
    layers = {name: layer for name, layer in engine.stages[0].layers.items() if isinstance(layer, TransformerLayer)}
    found: list[list[str]] = []

    def look(module: torch.nn.Module, given: Any) -> None:
        found.append([name for name, layer in layers.items() if not isinstance(layer.mlp_norm.weight, DTensor)])

    for layer in layers.values():
        layer.attention.register_forward_pre_hook(look)
    engine.train_step(0, batches_of(engine))
    engine.evaluate(batches_of(engine))
    return found


def test_one_layer_is_whole_at_a_time() -> None:
    one_after_another = [["0"], ["1"], ["2"], ["3"]]
    # two microbatches on each rank, forward; and again in evaluation
    assert run_on_ranks(2, gathered_at_once) == [4 * one_after_another] * 2


class Watching(Sharder):
    """Writes down how much is in memory each time."""

    def __init__(self, stage: GPTStage) -> None:
        super().__init__(ParallelState.alone(), torch.device("cpu"))
        self.seen: list[list[str]] = []
        self._stage = stage

    def shard(self, units: Sequence[Unit], prefix: str = "") -> None:
        layers = self._stage.layers.items()
        self.seen.append([name for name, layer in layers if not next(layer.parameters()).is_meta])
        super().shard(units, prefix)


def test_a_layer_is_sharded_before_the_next_one_takes_memory() -> None:
    stages = build_stages(gpt_spec(tiny_config(MOE, {}, {}), VOCAB), ParallelState.alone())
    sharder = Watching(stages[0])
    initialise_stages(stages, ParallelState.alone(), 1, torch.device("cpu"), sharder)
    everything = ["0", "1", "2", "3"]
    assert sharder.seen == [everything[:1], everything[:2], everything[:3], everything, everything]
    # alone there is nobody to share with
    assert sharder.parameters == []


def low_precision(rank: int, world_size: int, parallel: dict[str, Any]) -> dict[str, Any]:
    """Twelve steps on the same batch in bf16."""
    engine = engine_of(parallel, world_size, "bf16")
    seen: set[torch.dtype] = set()
    for module in engine.stages[0].modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda part, given, out: seen.add(part.qkv.dtype))
    losses = [engine.train_step(0, batches_of(engine)).metrics.loss for _ in range(12)]
    stored = {block.name: block.tensor.dtype for block in [*engine.weight_blocks(), *engine.optimizer.blocks()]}
    return {
        "losses": losses,
        "seen": seen,
        "masters": {bucket.own_weights.dtype for bucket in engine.buckets.buckets},
        "gradients": {bucket.own_gradients.dtype for bucket in engine.buckets.buckets},
        "stored": stored,
    }


def test_masters_are_wide_where_modules_compute_in_bf16() -> None:
    found = run_on_ranks(2, low_precision, ZERO_3)
    other = run_on_ranks(2, low_precision, {})[0]
    first = found[0]
    assert first["losses"] == found[1]["losses"]
    assert first["losses"][-1] < 0.8 * first["losses"][0]
    # bf16 keeps 8 bits, and whole gradients of a microbatch are rounded to them
    assert first["losses"] == pytest.approx(other["losses"], rel=0.01)
    assert (first["seen"], first["masters"], first["gradients"]) == ({torch.bfloat16}, {torch.float32}, {torch.float32})
    # under the same names and of the same types as ZeRO-1 stores them
    stored = [{**found[0]["stored"], **found[1]["stored"]}, other["stored"]]
    assert {name: stored[0][name] for name in stored[1]} == stored[1]
    assert stored[0]["layers.1.mlp.router.weight"] == torch.float32
    assert stored[0]["layers.1.mlp.experts.0.w1"] == torch.bfloat16
    assert stored[0]["master/layers.1.mlp.experts.0.w1"] == torch.float32


SOFT = {"router_type": "soft_moe", "router_options": {"slots": "3"}, "allow_noncausal": True, "aux_loss_coeff": 0.0}


def mixed_dtypes(rank: int, world_size: int, parallel: dict[str, Any]) -> tuple[list[float], set[str]]:
    """Two steps in bf16, and which parameters of a sparse layer are whole between them."""
    engine = engine_of(parallel, world_size, "bf16", SOFT)
    losses = [engine.train_step(step, batches_of(engine)).metrics.loss for step in range(2)]
    sparse = engine.stages[0].moe_layers()[1]
    return losses, {name for name, weight in sparse.named_parameters() if not isinstance(weight, DTensor)}


def test_wide_parameters_beside_experts_in_one_module_stay_whole() -> None:
    (losses, whole), _ = run_on_ranks(2, mixed_dtypes, ZERO_3)
    assert whole == {"phi", "scale"}
    (expected, _), _ = run_on_ranks(2, mixed_dtypes, {})
    assert losses == pytest.approx(expected, rel=0.001)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def steps_of(corpus: Path, notes: Path, ranks: int, parallel: Mapping[str, Any], **changes: Any) -> list[Step]:
    """A run, or one more part of one."""
    notes.mkdir()
    config = job(corpus, parallel=parallel, **changes)
    assert run_on_ranks(ranks, attempt, config.to_json(), str(notes), 0, None) == [0] * ranks
    return read_steps(notes, ranks)


def test_a_resumed_run_is_the_same_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    parts: list[Step] = []
    common: dict[str, Any] = {"moe": MOE, "precision": {"dtype": "bf16"}}
    length = {"train_iters": 6}
    whole = steps_of(corpus, tmp_path / "whole", 2, ZERO_3, **common, training=length)
    saving = {"save": str(tmp_path / "saved"), "load": "latest"}
    for part in ("first", "second"):
        more = {"training": {**length, "exit_interval": 3}, "checkpoint": saving}
        parts += steps_of(corpus, tmp_path / part, 2, ZERO_3, **common, **more)
    assert parts == whole


def test_a_run_goes_on_with_zero_1_in_another_layout_and_comes_back(corpus: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"moe": MOE, "precision": {"dtype": "fp64"}}
    length = {"train_iters": 6}
    whole = steps_of(corpus, tmp_path / "whole", 1, {}, **common, training=length)
    saving = {"save": str(tmp_path / "saved"), "load": "latest"}
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "ZeRO-3": (2, {TP: 2, ETP: 1, **ZERO_3}),
        "ZeRO-1": (4, {TP: 2, EP: 2, ETP: 1}),
        "ZeRO-3 again": (4, {EP: 2, **ZERO_3}),
    }
    parts: list[Step] = []
    for name, (ranks, parallel) in layouts.items():
        more = {"training": {**length, "exit_interval": 2}, "checkpoint": saving}
        parts += steps_of(corpus, tmp_path / name, ranks, parallel, **common, **more)
    assert [step.step for step in parts] == [step.step for step in whole]
    for step, expected in zip(parts, whole, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-9)
