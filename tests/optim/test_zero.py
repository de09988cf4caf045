"""The sharded optimizer equals a whole-model loop on every layout, and its state moves between layouts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from optim.toy_model import LAYOUTS, Oracle, Training, Whole, initial_weights, worst_error
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.communicator import Communicator, Pending
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState

FLOAT64_ROUNDING = 1e-12  # three steps; sums in another order
FLOAT32_ROUNDING = 1e-5
GRIDS: dict[int, list[dict[str, int]]] = {
    2: [{}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"ep": 2}, {"etp": 2}],
    4: [
        {},
        {"tp": 2},
        {"tp": 2, "ep": 2},
        {"ep": 2},
        {"ep": 4},
        {"ep": 2, "etp": 2},
        {"cp": 2, "etp": 2},
        {"pp": 2, "ep": 2},
    ],
    8: [{"tp": 2, "pp": 2, "ep": 2}, {"tp": 2, "cp": 2, "ep": 4, "etp": 2}],
}


def test_one_process_equals_the_loop() -> None:
    for sharded in (True, False):
        training = Training(ParallelState.alone(), sharded=sharded).run(range(4))
        assert max(worst_error(training, Oracle(initial_weights(torch.float64)).run(4))) < FLOAT64_ROUNDING


def errors_on_all_layouts(rank: int, world_size: int, oracle: Oracle) -> float:
    worst = 0.0
    for sizes in GRIDS[world_size]:
        state = ParallelState.distributed(Grid(world_size, **sizes))
        for sharded in (True, False):
            worst = max(worst, *worst_error(Training(state, sharded=sharded).run(range(3)), oracle))
    return worst


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_layout_equals_the_loop(world_size: int) -> None:
    oracle = Oracle(initial_weights(torch.float64)).run(3)
    assert max(run_on_ranks(world_size, errors_on_all_layouts, oracle)) < FLOAT64_ROUNDING


class Deaf(Communicator):
    """Moves data like another communicator, but never adds what the others say."""

    def __init__(self, other: Communicator, rank: int) -> None:
        self.other = other
        self.rank = rank

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        start = sum(rows[: self.rank])
        return tensor[start : start + rows[self.rank]].clone()

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return self.other.all_gather(tensor, rows)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self.other.all_to_all(tensor, send, receive)

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        return self.other.broadcast_(tensor, source)

    def send(self, tensor: Tensor, to: int) -> Pending:
        return self.other.send(tensor, to)

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        return self.other.receive_(tensor, source)

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        return self.other.send_receive_(tensor, to, received, source)

    def barrier(self) -> None:
        self.other.barrier()


def error_without_a_sum(
    rank: int, world_size: int, sizes: dict[str, int], name: str, sharded: bool, oracle: Oracle
) -> float:
    state = ParallelState.distributed(Grid(world_size, **sizes))
    axis = state.axis(name)
    mute = dataclasses.replace(axis, comm=Deaf(axis.comm, axis.rank))
    state = dataclasses.replace(state, **{name: mute})
    return max(worst_error(Training(state, sharded=sharded).run(range(3)), oracle))


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("sizes", "name"),
    [({}, "dp_cp"), ({}, "edp"), ({}, "world"), ({"tp": 2}, "tp"), ({"tp": 2}, "world"), ({"pp": 2}, "embedding")],
)
def test_the_comparison_notices_each_missing_sum(sizes: dict[str, int], name: str, sharded: bool) -> None:
    oracle = Oracle(initial_weights(torch.float64)).run(3)
    assert max(run_on_ranks(2, error_without_a_sum, sizes, name, sharded, oracle)) > 1e-3


def bf16_run(rank: int, world_size: int, sizes: dict[str, int], oracle: Oracle) -> dict[str, bool]:
    state = ParallelState.distributed(Grid(world_size, **sizes))
    training = Training(state, dtype=torch.bfloat16).run(range(3))
    blocks = training.optimizer.blocks()
    masters = [block for block in blocks if block.name.startswith("master/")]
    want = _logical(oracle.weights)
    close = [
        np.allclose(block.tensor.numpy(), _rectangle(want, block), rtol=FLOAT32_ROUNDING, atol=FLOAT32_ROUNDING)
        for block in masters
    ]
    rounded = [
        torch.equal(segment.of(shard.bucket.own_weights), segment.of(shard.master).to(torch.bfloat16))
        for shard in training.optimizer._shards
        for segment in shard.bucket.segments
    ]
    return {
        "wide": all(block.tensor.dtype == torch.float32 for block in blocks),
        "close": all(close) and len(close) > 0,
        "rounded": all(rounded),
        # half a unit in the last of 8 bits, of the largest element
        "parameters": worst_error(training, oracle)[0] < 2.0**-8,
        "bf16": all(weight.dtype == torch.bfloat16 for _, weight in training.parameters()),
    }


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"ep": 2}])
def test_bf16_parameters_follow_a_wide_master(sizes: dict[str, int]) -> None:
    oracle = Oracle(initial_weights(torch.bfloat16)).run(3)
    for found in run_on_ranks(2, bf16_run, sizes, oracle):
        assert all(found.values()), found


def test_small_updates_are_not_lost_in_bf16() -> None:
    training = Training(ParallelState.alone(), dtype=torch.bfloat16)
    norm = dict(training.parameters())["final_norm.weight"]
    before = norm.detach().clone()
    training.buckets.zero_()
    for _ in range(40):
        norm.main_grad.fill_(1.0)  # type: ignore[attr-defined]
        training.optimizer.step(lr=1e-4)  # each far below half a unit in the last place
    moved = (before.float() - norm.detach().float()).mean().item()
    assert moved == pytest.approx(40e-4, rel=0.3)


def _logical(whole: Whole) -> Whole:
    """Whole parameters under the names of the checkpoint: each expert of a stack by itself."""
    found: Whole = {}
    for name, values in whole.items():
        room, leaf = name.rsplit(".", 1)
        stack = LAYOUTS[name].stacked
        found |= {f"{room}.{expert}.{leaf}": part for expert, part in enumerate(values)} if stack else {name: values}
    return found


def _rectangle(whole: Whole, block: Block) -> Any:
    name = block.name.split("/", 1)[-1]
    return whole[name][tuple(slice(at, at + size) for at, size in zip(block.offset, block.shape, strict=True))]


@dataclasses.dataclass
class Saved:
    """What travels between processes in place of a checkpoint: rectangles with NumPy values."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Any
    primary: bool


def save(training: Training) -> list[Saved]:
    return [
        Saved(block.name, block.global_shape, block.offset, block.tensor.double().numpy().copy(), block.primary)
        for block in training.blocks()
    ]


def load(training: Training, whole: Whole, step_count: int) -> None:
    for block in training.blocks():
        cut = tuple(slice(at, at + size) for at, size in zip(block.offset, block.shape, strict=True))
        block.tensor.copy_(torch.from_numpy(whole[block.name][cut].copy()))
    training.optimizer.load_state_dict({"step_count": step_count})


def assemble(saved: list[list[Saved]]) -> Whole:
    """Put the primaries' rectangles together: each element once; all other holders must agree bit by bit."""
    whole: Whole = {}
    times: dict[str, Any] = {}
    rectangles = [one for rank in saved for one in rank]
    for one in sorted(rectangles, key=lambda one: not one.primary):
        values = whole.setdefault(one.name, np.full(one.global_shape, np.nan))
        count = times.setdefault(one.name, np.zeros(one.global_shape, dtype=int))
        cut = tuple(slice(at, at + size) for at, size in zip(one.offset, one.values.shape, strict=True))
        if one.primary:
            values[cut] = one.values
            count[cut] += 1
        else:
            assert np.array_equal(values[cut], one.values), one.name
    assert all((count == 1).all() for count in times.values())
    return whole


@dataclasses.dataclass
class Run:
    """A toy run before its ranks exist."""

    sizes: dict[str, int]
    sharded: bool = True
    dtype: torch.dtype = torch.float64

    def start(self, world_size: int) -> Training:
        state = ParallelState.distributed(Grid(world_size, **self.sizes))
        return Training(state, dtype=self.dtype, sharded=self.sharded)


def train_and_save(rank: int, world_size: int, run: Run, steps: int) -> list[Saved]:
    return save(run.start(world_size).run(range(steps)))


def load_and_train(rank: int, world_size: int, run: Run, whole: Whole, steps: range) -> tuple[list[Saved], list[Saved]]:
    """The state just loaded, and after further steps."""
    training = run.start(world_size)
    load(training, whole, steps.start)
    loaded = save(training)
    return loaded, save(training.run(steps))


LAYOUTS_OF_FOUR: list[tuple[dict[str, int], bool]] = [
    ({}, True),
    ({}, False),
    ({"tp": 2}, True),
    ({"ep": 2}, True),
    ({"ep": 2, "etp": 2}, True),
    ({"tp": 2, "pp": 2, "ep": 2}, True),
    ({"pp": 2, "cp": 2}, False),
]


@pytest.mark.parametrize(("sizes", "sharded"), LAYOUTS_OF_FOUR)
def test_blocks_put_together_are_the_whole_state(sizes: dict[str, int], sharded: bool) -> None:
    oracle = Oracle(initial_weights(torch.float64)).run(2)
    whole = assemble(run_on_ranks(4, train_and_save, Run(sizes, sharded), 2))
    for prefix, want in (("", oracle.weights), ("exp_avg/", oracle.exp_avg), ("exp_avg_sq/", oracle.exp_avg_sq)):
        for name, values in _logical(want).items():
            got = whole.pop(prefix + name)
            assert np.abs(got - values).max() <= FLOAT64_ROUNDING * np.abs(values).max(), name
    assert not whole  # no "master/" where the parameters are wide themselves


@pytest.mark.parametrize(
    ("sizes", "sharded", "dtype"),
    [({}, True, torch.float64), ({"tp": 2, "ep": 2}, True, torch.bfloat16), ({"pp": 2}, False, torch.bfloat16)],
)
def test_resuming_on_the_same_layout_is_bit_exact(sizes: dict[str, int], sharded: bool, dtype: torch.dtype) -> None:
    run = Run(sizes, sharded, dtype)
    half = assemble(run_on_ranks(4, train_and_save, run, 2))
    unbroken = assemble(run_on_ranks(4, train_and_save, run, 4))
    answers = run_on_ranks(4, load_and_train, run, half, range(2, 4))
    resumed = assemble([after for _, after in answers])
    assert resumed.keys() == unbroken.keys()
    assert any(name.startswith("master/") for name in resumed) == (dtype == torch.bfloat16)
    assert all(np.array_equal(resumed[name], values) for name, values in unbroken.items())


@pytest.mark.parametrize(
    ("sizes", "sharded"), [({"tp": 2}, True), ({"ep": 4}, True), ({"pp": 2, "ep": 2}, True), ({"etp": 2}, False)]
)
def test_another_layout_holds_the_same_numbers_and_goes_on(sizes: dict[str, int], sharded: bool) -> None:
    half = assemble(run_on_ranks(2, train_and_save, Run({"ep": 2}), 2))
    answers = run_on_ranks(4, load_and_train, Run(sizes, sharded), half, range(2, 4))
    loaded = assemble([before for before, _ in answers])
    assert loaded.keys() == half.keys()
    assert all(np.array_equal(loaded[name], values) for name, values in half.items())
    after = assemble([after for _, after in answers])
    for name, values in _logical(Oracle(initial_weights(torch.float64)).run(4).weights).items():
        assert np.abs(after[name] - values).max() <= FLOAT64_ROUNDING * np.abs(values).max(), name


def test_masters_can_be_taken_from_newly_filled_weights() -> None:
    training = Training(ParallelState.alone(), dtype=torch.bfloat16)
    for _, parameter in training.parameters():
        parameter.data.fill_(3.0)
    training.optimizer.reset_masters()
    masters = [block.tensor for block in training.optimizer.blocks() if block.name.startswith("master/")]
    assert masters and all((master == 3.0).all() for master in masters)


def test_the_step_count_is_kept() -> None:
    training = Training(ParallelState.alone()).run(range(2))
    other = Training(ParallelState.alone())
    other.optimizer.load_state_dict(training.optimizer.state_dict())
    assert training.optimizer.state_dict() == {"step_count": 2}
    assert other.optimizer.step_count == 2
