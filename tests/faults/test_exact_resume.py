"""A new process that loads a checkpoint goes on bit for bit as the one that wrote it, with every way of routing."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.certify.layouts import ETP, LAYOUTS, TP
from megatron_moe.certify.tiny_model import GLOBAL_BATCH, VOCAB, samples, tiny_config
from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.data.loader import Loader
from megatron_moe.data.sampler import Sampler
from megatron_moe.moe.methods import METHODS
from megatron_moe.parallel.state import Groups, ParallelState
from megatron_moe.report.router_list import example_fields
from megatron_moe.training.engine import Engine, grid_of
from megatron_moe.training.validate import validate
from tests.end_to_end.tiny_job import hash_of
from tests.faults.engine_files import save_engine, with_steps

pytestmark = pytest.mark.timeout(7200)

CPU = torch.device("cpu")
LAST_SAVE, AFTER = 3, 2  # saved after 1 to 3 steps; steps after it
AXES = (
    "micro-batches of 2",
    "DP 2 with ZeRO-1",
    "TP 2 with sequence parallelism",
    "EP 2",
    "DP 2 without ZeRO-1",
    "PP 2",
)
# all experts are merged on each rank; there is one expert
REFUSED = {("smear", "EP 2"), ("mixture_of_depths", "EP 2")}
# whose experts, if they have any, are not split over tp
UNSPLIT = {
    *("smear", "mixture_of_depths", "vanilla_memory", "low_rank_keys"),
    *("product_keys", "product_keys_ffn", "controller"),
}
PAIRS = [pair for pair in itertools.product(METHODS, AXES) if pair not in REFUSED]
# what is random only if asked to be
DRAWS: dict[str, dict[str, Any]] = {
    "switch": {"router_options": {"jitter_eps": "0.1"}},
    "smear": {"router_options": {"jitter_eps": "0.1", "expert_dropout": "0.3"}},
}


@dataclass(frozen=True)
class Case:
    """Saved after `saved` steps.   forget: what the load leaves out."""

    method: str
    layout: str
    saved: int
    dtype: str
    forget: str = ""

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout].ranks

    def config(self) -> RunConfig:
        """With dropout of experts and jitter wherever there is one, and both losses."""
        moe = example_fields(self.method) | DRAWS.get(self.method, {})
        for name, value in (("aux_loss_coeff", 0.01), ("z_loss_coeff", 0.001), ("expert_dropout", 0.3)):
            if name not in METHODS[self.method].unused_fields:
                moe[name] = value
        layout = LAYOUTS[self.layout]
        at_once = max(layout.micro_batch_size, int(moe.get("routing_group_samples", 1)))
        parallel = dict(layout.parallel)
        if TP in parallel and self.method in UNSPLIT:
            parallel[ETP] = 1
        config = with_steps(
            tiny_config(moe, parallel, {"num_layers": 2}, at_once, dtype=self.dtype), LAST_SAVE + AFTER
        )
        validate(config)
        return config


class Samples:
    """The tiny model's samples."""

    def get(self, indices: Sequence[int]) -> Batch:
        return samples(indices)


class Run:
    """One rank's part of a run that has just begun."""

    def __init__(self, config: RunConfig, state: ParallelState) -> None:
        self.engine = Engine(config, state, CPU, VOCAB)
        sampler = Sampler(
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=state.dp.rank,
            dp_size=state.dp.size,
        )
        self.loader = Loader(Samples(), sampler)
        self.step = 0

    def train(self, steps: int) -> list[tuple[str, float]]:
        """The hash of all that is carried on, before the first and after each step, and its loss."""
        found = [(self.hash(), 0.0)]
        for _ in range(steps):
            loss = self.engine.train_step(self.step, next(self.loader)).metrics.loss
            self.step += 1
            found.append((self.hash(), loss))
        return found

    def hash(self) -> str:
        return f"{self.step} {hash_of(self.engine, self.loader)}"

    def save(self, folder: Path) -> None:
        save_engine(self.engine, folder, self.step, {"step": self.step, "loader": self.loader.state_dict()})

    def load(self, folder: Path, forget: str) -> None:
        engine = self.engine
        reader = find_checkpoint(folder, None, engine.state.world, check="on_read")
        first = [buffer.clone() for module in engine.modules for buffer in module.buffers()]
        engine.fill_weights(reader.fill_all)
        if forget == "buffers":
            for buffer, value in zip((b for m in engine.modules for b in m.buffers()), first, strict=True):
                buffer.copy_(value)
        reader.fill_all(engine.optimizer.blocks(), "optim")
        if forget == "moments":
            for block in engine.optimizer.blocks():
                block.tensor.zero_()
        if forget != "step count":
            engine.optimizer.load_state_dict(reader.state["optimizer"])
        self.step = int(reader.state["step"])
        if forget != "samples":
            self.loader.load_state_dict(reader.state["loader"])


Told = list[tuple[str, float]]


def work(rank: int, world_size: int, cases: Sequence[Case], root: Path) -> list[tuple[Told, Told]]:
    """For each case what came after the save, and what comes after the load."""
    groups: Groups = {}
    found = []
    for number, case in enumerate(cases):
        config = case.config()
        state = ParallelState.distributed(grid_of(config, world_size), known=groups)
        first = Run(config, state)
        first.train(case.saved)
        first.save(root / f"{world_size} {number}")
        went_on = first.train(AFTER)
        second = Run(config, state)
        second.load(root / f"{world_size} {number}", case.forget)
        found.append((went_on, second.train(AFTER)))
    return found


def differences(cases: Sequence[Case], root: Path) -> list[list[int]]:
    """For each case the numbers of the steps after which some rank's state or loss is not the same bits."""
    found: dict[Case, list[int]] = {}
    for ranks in sorted({case.ranks for case in cases}):
        some = [case for case in cases if case.ranks == ranks]
        for case, told in zip(some, zip(*run_on_ranks(ranks, work, some, root), strict=True), strict=True):
            found[case] = [step for step in range(AFTER + 1) if any(one[step] != other[step] for one, other in told)]
    return [found[case] for case in cases]


def plan(nightly: bool) -> list[tuple[str, str]]:
    """All pairs three times; or each method on two layouts, going round them."""
    if nightly:
        return PAIRS * 3
    found = []
    for number, method in enumerate(METHODS):
        own = [layout for name, layout in PAIRS if name == method]
        found += [(method, own[(number + more) % len(own)]) for more in (0, len(own) // 2)]
    return found


@pytest.mark.goal(
    "R11",
    ci=2 * len(METHODS),
    nightly=3 * len(PAIRS),
    what="saved at a random step, loaded by a new engine: every later step has the same bits",
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, trials: Trials) -> None:
    pairs = plan(nightly=trials.wanted > 2 * len(METHODS))
    rng = random.Random(trials.seed)
    drawn = [(rng.randint(1, LAST_SAVE), rng.choice(("fp32", "bf16"))) for _ in range(trials.first + trials.wanted)]
    cases = {n: Case(*pairs[n % len(pairs)], *drawn[n]) for n in range(trials.first, trials.first + trials.wanted)}
    found = dict(zip(cases, differences(list(cases.values()), tmp_path), strict=True))
    for number, _ in trials:
        assert found[number] == [], cases[number]


def test_the_short_plan_meets_every_method_twice_and_every_layout() -> None:
    pairs = plan(nightly=False)
    assert {layout for _, layout in pairs} == set(AXES)
    assert sorted(name for name, _ in set(pairs)) == sorted([*METHODS, *METHODS])


@pytest.mark.parametrize(
    ("forget", "wrong"),
    [("", []), ("buffers", [0, 1, 2]), ("step count", [0, 1, 2]), ("moments", [0, 1, 2]), ("samples", [0, 1, 2])],
)
def test_what_is_forgotten_shows(tmp_path: Path, forget: str, wrong: list[int]) -> None:
    # expert_choice_threshold remembers where it cut
    cases = [Case("expert_choice_threshold", "micro-batches of 2", 2, dtype, forget) for dtype in ("fp32", "bf16")]
    assert differences(cases, tmp_path) == [wrong, wrong]
