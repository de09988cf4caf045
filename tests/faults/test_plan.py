"""A fault is one short line, and every point that a line can name is really reached."""

import random
from pathlib import Path

import pytest
from ranks import run_on_ranks

from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of
from megatron_moe.training.trainer import Trainer
from tests.checkpoint.samples import HastyStorage, newest
from tests.end_to_end.tiny_job import CPU, job, write_corpus
from tests.faults.inject import Faults, FaultyStorage, InjectedError, attach
from tests.faults.plan import CALLS, KINDS, POINTS, Fault, FaultPlan


def test_a_line_says_all_of_a_fault() -> None:
    fault = Fault.parse("ckpt.before_manifest:kill@rank2,step40")
    assert fault == Fault("ckpt.before_manifest", "kill", rank=2, step=40)
    rng = random.Random(0)
    kinds = set()
    for _ in range(2000):
        words = (rng.choice([None, 0, 3]), rng.choice([None, 0, 17]))
        try:
            made = Fault(rng.choice(list(POINTS)), rng.choice(KINDS), *words, bool(words[1]), rng.choice([1, 2, 30]))
        except ValueError:
            continue
        kinds.add(made.kind)
        assert Fault.parse(str(made)) == made
    assert kinds == set(KINDS)
    plan = FaultPlan.parse("step.begin:nan@step3;  storage.any:ENOSPC@rank1,step4+,nth7")
    assert str(plan) == "step.begin:nan@step3; storage.any:ENOSPC@rank1,step4+,nth7"
    assert FaultPlan.parse(str(plan)) == plan
    assert FaultPlan.parse("") == FaultPlan()


@pytest.mark.parametrize(
    "line",
    [
        "nowhere:kill",
        "step.begin:sneeze",
        "step.begin:kill@rank1,rank2",
        "step.begin:kill@node3",
        "step.begin:kill@nth0",
        "step.begin:ENOSPC",
        "storage.fsync:cut",
        "storage.write:nan",
        "step.begin",
        "step.begin:kill@",
        "",
    ],
)
def test_a_line_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"fault|point|strike|none of"):
        Fault.parse(line)


def test_a_fault_strikes_once_where_and_when_it_should() -> None:
    faults = Faults(FaultPlan.parse("step.begin:raise@rank1,step3,nth2"), 1)
    told = []
    for step in (1, 2, 3, 3, 3, 4):
        faults.now = step
        try:
            faults.reach("step.begin")
        except InjectedError:
            told.append(step)
    assert told == [3] and [(str(fault), step) for fault, step in faults.struck] == [
        ("step.begin:raise@rank1,step3,nth2", 3)
    ]
    onward = Faults(FaultPlan.parse("step.begin:raise@step3+"), 0)
    onward.now = 7
    with pytest.raises(InjectedError):
        onward.reach("step.begin")
    elsewhere = Faults(FaultPlan.parse("step.begin:raise@rank2"), 1)
    elsewhere.reach("step.begin")


@pytest.mark.parametrize(("kind", "on_disk", "taken"), [("short", b"ab", 2), ("cut", b"ab", 4), ("flip", b"abbd", 4)])
def test_what_a_faulty_write_leaves(kind: str, on_disk: bytes, taken: int, tmp_path: Path) -> None:
    storage = FaultyStorage(Faults(FaultPlan.parse(f"storage.write:{kind}"), 0))
    file = storage.create(tmp_path / "file")
    assert storage.write(file, memoryview(b"abcd")) == taken
    storage.close(file)
    assert (tmp_path / "file").read_bytes() == on_disk


def visit(rank: int, world_size: int, texts: list[str]) -> dict[str, int]:
    """Which points two runs reach, the second of which goes on from the first."""
    reached: dict[str, int] = {}
    for text in texts:
        config = RunConfig.from_json(text)
        trainer = Trainer(config, ParallelState.distributed(grid_of(config, world_size)), CPU)
        faults = Faults(FaultPlan(), rank)
        faults.reach("startup.begin")
        attach(trainer, faults)
        faults.reach("startup.built")
        assert trainer.run() == 0
        reached = {point: reached.get(point, 0) + faults.reached[point] for point in POINTS}
    return reached


def test_every_point_is_reached(tmp_path: Path) -> None:
    changes = {
        "training": {"train_iters": 6, "eval_interval": 3, "eval_iters": 1},
        "checkpoint": {"save": str(tmp_path / "saved"), "load": "latest", "save_interval": 1, "keep": 1},
    }
    config = job(write_corpus(tmp_path / "tokens"), **changes)
    first = job(tmp_path / "tokens", **changes | {"training": changes["training"] | {"exit_interval": 4}})
    found = run_on_ranks(2, visit, [first.to_json(), config.to_json()])
    assert newest(tmp_path / "saved").step == 6
    assert [point for point in POINTS if not found[0][point]] == []
    # the others do not write what is written once
    alone = {point for point in POINTS if not found[1][point]}
    once = {"storage.make_dir", "storage.sync_dir", "storage.rename", "storage.symlink"}
    ours = {point for point in POINTS if point.startswith("ckpt.")} - {"ckpt.snapshot"}
    assert alone == {"storage.unlink", "storage.remove_dir", "restarts.any"} | once | ours
    # and no point is forgotten when Storage learns another call
    assert set(CALLS) == {name for name in vars(FaultyStorage) if not name.startswith("_")}
    assert {name for name in vars(HastyStorage.__base__) if not name.startswith("_")} == set(CALLS)
