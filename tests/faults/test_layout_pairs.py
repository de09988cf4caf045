"""A checkpoint of any layout loads on any other: the same bits in every logical tensor, and the run goes on alike."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.certify.combinations import layouts
from megatron_moe.certify.tiny_model import GLOBAL_BATCH, VOCAB, pairs, samples, tiny_config
from megatron_moe.certify.tiny_run import TOLERANCE
from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.world import check_world
from megatron_moe.data.sampler import Sampler
from megatron_moe.parallel.state import Groups, ParallelState
from megatron_moe.training.engine import Engine, grid_of
from megatron_moe.training.validate import validate
from tests.faults.engine_files import save_engine, with_steps
from tests.faults.slow_reader import differences, read_tensors

pytestmark = pytest.mark.timeout(7200)

CPU = torch.device("cpu")
SAVED, STEPS = 2, 5
# deepseek_v3 remembers a bias for each expert; gshard draws at random
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"moe": {"num_experts": 0}, "model": {}},
    "dense, own head": {"moe": {"num_experts": 0}, "model": {"untie_embeddings_and_output_weights": True}},
    "MoE that remembers": {"moe": {"router_type": "deepseek_v3", "router_topk": 2, "aux_loss_coeff": 0.0}, "model": {}},
    "MoE that draws": {"moe": {"router_type": "gshard", "aux_loss_coeff": 0.01}, "model": {}},
    # so that there are master weights
    "MoE in bfloat16": {"moe": {"router_type": "top_k", "aux_loss_coeff": 0.01}, "model": {}, "dtype": "bf16"},
    "encoder-decoder": {
        "moe": {"router_type": "st_moe", "expert_capacity_factor": 1.0, "extra_ffn": "after"},
        "encoder_moe": {"router_type": "deepseek_v3", "router_topk": 2, "layer_freq": "1", "aux_loss_coeff": 0.0},
        "model": {
            "encoder_num_layers": 2,
            "position_embedding_type": "relative",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 10,
        },
    },
}
POOL = {name: layout for name, layout in layouts("default").items() if not layout.uneven}


@dataclass(frozen=True)
class Run:
    """A family on a layout."""

    family: str
    layout: str

    @property
    def ranks(self) -> int:
        return POOL[self.layout].ranks

    def config(self) -> RunConfig:
        fields, layout = FAMILIES[self.family], POOL[self.layout]
        model, parallel = fields["model"], layout.fields_for(fields["model"].get("encoder_num_layers", 0), 4)
        made = tiny_config(
            fields["moe"],
            parallel,
            model,
            layout.micro_batch_size,
            dtype=fields.get("dtype", "fp64"),
            encoder_moe=fields.get("encoder_moe"),
        )
        return with_steps(made, STEPS)

    @property
    def tolerance(self) -> float:
        """Of losses."""
        return TOLERANCE if "dtype" not in FAMILIES[self.family] else 0.02


def is_legal(run: Run) -> bool:
    try:
        config = run.config()
        validate(config)
        check_world(config, run.ranks)
    except ConfigError:
        return False
    return POOL[run.layout].samples_of_a_rank(GLOBAL_BATCH) >= POOL[run.layout].micro_batch_size


def train(engine: Engine, config: RunConfig, steps: range) -> list[float]:
    draw = pairs if config.model.encoder_num_layers else samples
    losses = []
    for step in steps:
        sampler = Sampler(
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=engine.state.dp.rank,
            dp_size=engine.state.dp.size,
            consumed=step * GLOBAL_BATCH,
        )
        losses.append(engine.train_step(step, [draw(some) for some in sampler.microbatches()]).metrics.loss)
    return losses


def load(engine: Engine, folder: Path) -> None:
    reader = find_checkpoint(folder, None, engine.state.world)
    engine.fill_weights(reader.fill_all)
    reader.fill_all(engine.optimizer.blocks(), "optim")
    engine.optimizer.load_state_dict(reader.state["optimizer"])


@dataclass(frozen=True)
class Task:
    """Train and save; or load from a folder, and save again what was loaded. Then go on to the end."""

    run: Run
    saved: Path
    loaded: Path | None = None


def work(rank: int, world_size: int, tasks: Sequence[Task]) -> list[list[float]]:
    groups: Groups = {}
    found = []
    for task in tasks:
        config = task.run.config()
        state = ParallelState.distributed(grid_of(config, world_size), known=groups)
        engine = Engine(config, state, CPU, VOCAB)
        if task.loaded is None:
            train(engine, config, range(SAVED))
        else:
            load(engine, task.loaded)
        save_engine(engine, task.saved, SAVED)
        found.append(train(engine, config, range(SAVED, STEPS)))
    return found


def do(tasks: Sequence[Task]) -> Mapping[Path, list[float]]:
    """All of them, those of equally many ranks in one start; the losses of each, by where it saved."""
    losses = {}
    for ranks in sorted({task.run.ranks for task in tasks}):
        some = [task for task in tasks if task.run.ranks == ranks]
        for task, found in zip(some, run_on_ranks(ranks, work, some)[0], strict=True):
            losses[task.saved] = found
    return losses


def draw_run(rng: random.Random, family: str, other_than: str = "") -> Run:
    # few on eight ranks: they take longest
    most = 8 if rng.random() < 0.15 else 4
    names = [name for name, layout in POOL.items() if layout.ranks <= most and name != other_than]
    while True:
        run = Run(family, rng.choice(names))
        if is_legal(run):
            return run


SOURCES = 2  # of each family


@pytest.mark.goal("R13", ci=40, nightly=400, what="saved on one layout, loaded on another: the same bits and losses")
def test_any_layout_loads_on_any_other(tmp_path: Path, trials: Trials) -> None:
    rng = random.Random(f"{trials.seed} sources")
    count = SOURCES * (1 if trials.wanted < 100 else 5)
    sources = {family: [draw_run(rng, family) for _ in range(count)] for family in FAMILIES}
    first = [
        Task(run, tmp_path / f"{family} {number}")
        for family, runs in sources.items()
        for number, run in enumerate(runs)
    ]
    second = []
    for number, draw in trials:
        source = draw.choice(first)
        target = draw_run(draw, source.run.family, source.run.layout)
        second.append((source, Task(target, tmp_path / str(number), loaded=source.saved)))
    wanted = do(first)
    found = do([task for _, task in second])
    step = f"step_{SAVED:08d}"
    for source, task in second:
        pair = f"{source.run} -> {task.run.layout}"
        assert differences(read_tensors(task.saved / step), read_tensors(source.saved / step)) == [], pair
        for mine, theirs in zip(found[task.saved], wanted[source.saved], strict=True):
            assert mine == pytest.approx(theirs, rel=task.run.tolerance), pair


def test_the_comparison_bites(tmp_path: Path) -> None:
    run = Run("MoE that remembers", "DP 2 with ZeRO-1")
    wanted = do([Task(run, tmp_path / "a")])
    again = do([Task(Run(run.family, "micro-batches of 2"), tmp_path / "b", loaded=tmp_path / "a")])
    step = f"step_{SAVED:08d}"
    tensors, same = read_tensors(tmp_path / "a" / step), read_tensors(tmp_path / "b" / step)
    assert differences(same, tensors) == [] and again[tmp_path / "b"] == pytest.approx(wanted[tmp_path / "a"], rel=1e-9)
    kinds = {name.partition("/")[0] + "/" + name.partition("/")[2].split("/")[0] for name in tensors if "optim" in name}
    assert kinds == {"optim/exp_avg", "optim/exp_avg_sq"}
    for name in ("model/layers.1.mlp.router.bias", "optim/exp_avg_sq/layers.0.attention.qkv"):
        key = next((key for key in tensors if key.startswith(name[:25])), None)
        assert key is not None, (name, sorted(tensors)[:60])
        changed = {**tensors, key: tensors[key].copy()}
        changed[key].reshape(-1).view("u1")[0] ^= 1
        assert differences(changed, tensors) == [key]
