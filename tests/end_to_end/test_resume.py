"""A run that is killed again and again ends as one that never was, bit for bit; and it goes on in another layout."""

import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.config.errors import PeerError
from megatron_moe.config.run import RunConfig
from tests.end_to_end.tiny_job import GLOBAL_BATCH, Step, attempt, job, read_steps, write_corpus
from tests.faults.plan import Fault, FaultPlan

STEPS, INTERVAL = 12, 2
TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "DP 2, ZeRO-1": (2, {}),
    "TP 2 x EP 2": (4, {TP: 2, EP: 2}),
    "PP 2": (2, {PP: 2}),
}
# the second expert of gshard is drawn at random: a wrong counter shows; deepseek_v3 remembers a bias for each expert
ROUTERS: dict[bool, dict[str, Any]] = {
    True: {"router_type": "gshard"},
    False: {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0},
}
PLACES = ("step.begin", "step.reduced", "step.updated")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def run(config: RunConfig, world_size: int, notes: Path, number: int = 0, kill: Fault | None = None) -> None:
    notes.mkdir(exist_ok=True)
    arguments = (config.to_json(), str(notes), number, FaultPlan((kill,)) if kill else None)
    if kill is None:
        assert run_on_ranks(world_size, attempt, *arguments) == [0] * world_size
        return
    with pytest.raises(PeerError):
        run_on_ranks(world_size, attempt, *arguments)


def plan(seed: str, world_size: int, background: bool) -> list[Fault]:
    """Three kills, further and further into the run, one of them while a checkpoint is being written."""
    chosen = random.Random(seed)
    steps = sorted(chosen.sample(range(2, STEPS), 3))
    places = ["storage.write", *chosen.sample(PLACES, 2)]
    chosen.shuffle(places)
    kills = []
    for step, place in zip(steps, places, strict=True):
        saving = place == "storage.write"
        # rank 0 also writes the small files; a later write is one of those
        nth = chosen.randint(1, 2 if background else 3) if saving else 1
        kills.append(Fault(place, "kill", chosen.randrange(world_size), step, onward=saving, nth=nth))
    return kills


@pytest.mark.parametrize("background", [True, False], ids=["saved beside", "saved at once"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_ends_as_one_that_was_not(layout: str, background: bool, corpus: Path, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    saving = {"save_interval": INTERVAL, "keep": 2, "async_save": background, "load": "latest"}
    changes: dict[str, Mapping[str, Any]] = {"parallel": parallel, "moe": ROUTERS[background]}
    whole = job(corpus, **changes, checkpoint={**saving, "save": str(tmp_path / "whole")})
    broken = job(corpus, **changes, checkpoint={**saving, "save": str(tmp_path / "broken")})
    run(whole, world_size, tmp_path / "whole notes")
    expected = {step.step: step for step in read_steps(tmp_path / "whole notes", world_size)}
    assert list(expected) == list(range(1, STEPS + 1))

    kills = plan(f"{layout} {background}", world_size, background)
    for number, kill in enumerate(kills):
        run(broken, world_size, tmp_path / "broken notes", number, kill)
    run(broken, world_size, tmp_path / "broken notes", len(kills))

    steps = read_steps(tmp_path / "broken notes", world_size)
    for step in steps:
        assert replace(step, attempt=0) == expected[step.step], f"attempt {step.attempt} of {[*map(str, kills)]}"
    firsts = first_steps(steps)
    assert firsts[0] == 1 and steps[-1].step == STEPS
    last = steps[-1].attempt
    assert last == len(kills) and firsts[last] > 1, "the last start went on from a checkpoint"
    check_samples(steps)
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["latest", "step_00000010", "step_00000012"]
    # the files too: what a checkpoint says of the run is the same whether it was killed or not
    assert tensor_files(tmp_path / "broken") == tensor_files(tmp_path / "whole")


def first_steps(steps: list[Step]) -> dict[int, int]:
    """The first step of each attempt."""
    found: dict[int, int] = {}
    for step in steps:
        found.setdefault(step.attempt, step.step)
    return found


def check_samples(steps: list[Step]) -> None:
    """Each step reads the samples that belong to it: none twice, none left out."""
    for step in steps:
        assert step.samples == list(range((step.step - 1) * GLOBAL_BATCH, step.step * GLOBAL_BATCH))
        assert step.consumed == step.step * GLOBAL_BATCH


def tensor_files(root: Path) -> dict[str, bytes]:
    """All that the newest checkpoint holds of the model, the optimizer and the state."""
    kept = (".safetensors", "state.json", "data.json")
    return {path.name: path.read_bytes() for path in (root / "latest").iterdir() if path.name.endswith(kept)}


FLOAT64: dict[str, Any] = {"dtype": "fp64"}
# in another order of summation: design.md asks for 1e-9
TOLERANCE = 1e-9


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(4, {PP: 2, EP: 2}), (4, {}), (1, {})],
    ids=["PP 2 x EP 2", "DP 4", "1 rank"],
)
@pytest.mark.goal("R12", ci=1, nightly=1, what="a run goes on in another layout: the same samples, the same losses")
def test_a_run_saved_on_tp_2_x_ep_2_goes_on_in_another_layout(
    world_size: int,
    parallel: dict[str, Any],
    half_run: Path,
    reference: list[Step],
    corpus: Path,
    tmp_path: Path,
    trials: Trials,
) -> None:
    shutil.copytree(half_run, tmp_path / "saved", symlinks=True)
    saving = {"save": str(tmp_path / "saved"), "load": "latest"}
    second = job(corpus, parallel=parallel, moe=ROUTERS[False], precision=FLOAT64, checkpoint=saving)
    run(second, world_size, tmp_path / "notes")
    steps = read_steps(tmp_path / "notes", world_size)
    assert [step.step for step in steps] == list(range(7, STEPS + 1))
    check_samples(steps)
    for step, expected in zip(steps, reference[6:], strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    trials.add(1)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """The whole run on one rank, never interrupted; its router remembers a bias."""
    folder = tmp_path_factory.mktemp("reference")
    run(job(corpus, moe=ROUTERS[False], precision=FLOAT64), 1, folder)
    return read_steps(folder, 1)


@pytest.fixture(scope="module")
def half_run(corpus: Path, reference: list[Step], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the first half, on TP 2 x EP 2."""
    folder = tmp_path_factory.mktemp("half")
    config = job(
        corpus,
        parallel={TP: 2, EP: 2},
        moe=ROUTERS[False],
        precision=FLOAT64,
        training={"exit_interval": 6},
        checkpoint={"save": str(folder / "saved")},
    )
    run(config, 4, folder / "notes")
    for step, expected in zip(read_steps(folder / "notes", 4), reference[:6], strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    return folder / "saved"


def test_the_hash_sees_a_resume_that_forgets_the_moments(corpus: Path, tmp_path: Path) -> None:
    """The oracle bites: weights, step and samples alone are not the whole state."""
    saving = {"save": str(tmp_path / "saved"), "load": "latest"}
    reference = job(corpus, moe=ROUTERS[True])
    run(reference, 1, tmp_path / "reference")
    run(job(corpus, moe=ROUTERS[True], training={"exit_interval": 10}, checkpoint=saving), 1, tmp_path / "first")
    found = {}
    for name, forgets in (("remembers", {}), ("forgets", {"no_load_optim": True})):
        loading = {"load": str(tmp_path / "saved"), **forgets}
        run(job(corpus, moe=ROUTERS[True], checkpoint=loading), 1, tmp_path / name)
        found[name] = [step.state for step in read_steps(tmp_path / name, 1)]
    expected = [step.state for step in read_steps(tmp_path / "reference", 1)[10:]]
    assert found["remembers"] == expected
    assert not set(found["forgets"]) & set(expected)
