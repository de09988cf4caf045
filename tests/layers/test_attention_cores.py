"""Which core a word of --cp-comm-type makes, and that what is made again gives the same."""

from dataclasses import replace

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.config.options import settings_of
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.layers.attention_core import GatheredAttention, RecomputedAttention, Sight
from megatron_moe.layers.attention_cores import CORES, build_core
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from tests.layers.contexts import context
from tests.layers.sequence_cases import CASES, WIDTH, B, answer_of_rank, draw, worst_errors

ROUNDING = 1e-13


def test_every_word_of_the_flag_makes_its_core() -> None:
    assert set(CORES) == set(settings_of(ParallelConfig)["cp_comm_type"].option.choices)
    axis = ParallelState.recorded(Grid(2, cp=2), 0)[0].cp
    assert [type(build_core(kind, axis)) for kind in CORES] == list(CORES.values())


@pytest.mark.parametrize("kind", CORES)
def test_a_rank_with_whole_sequences_gathers_nothing(kind: str) -> None:
    assert isinstance(build_core(kind, ParallelState.alone().cp), GatheredAttention)


def test_gathered_attention_finds_what_the_whole_softmax_finds() -> None:
    for found in run_on_ranks(2, worst_errors, GatheredAttention):
        assert all(error < ROUNDING for error in found.values()), found


@pytest.mark.parametrize("kind", CORES)
def test_any_rank_of_any_world_can_be_recorded_without_memory(kind: str) -> None:
    state, tallies = ParallelState.recorded(Grid(8, cp=8), 5)
    view = context(64, B, state, segments=torch.zeros(64, B, dtype=torch.int32)).view
    view = replace(view, **{name: getattr(view, name).to("meta") for name in ("segments", "rows")})
    shapes = ((8, B, 2, 4, WIDTH), (8, B, 2, WIDTH), (8, B, 2, WIDTH), (1, 8, 8, 64))
    inputs = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    answer = build_core(kind, state.cp)(*inputs[:3], Sight(view, view, True, inputs[3]))
    gradients = torch.autograd.grad(answer.sum(), inputs)
    assert answer.shape == shapes[0] and [gradient.shape for gradient in gradients] == list(shapes)
    assert sum(tallies["cp"].sent_bytes.values()) > 0


def made_again(rank: int, world_size: int) -> None:
    state = ParallelState.distributed(Grid(world_size, cp=world_size))
    case = CASES["a bias for each sample, a prefix, packed and padded"]
    for kind in CORES:
        core = build_core(kind, state.cp)
        kept, again = (answer_of_rank(one, case, draw(case), state) for one in (core, RecomputedAttention(core)))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, kept, strict=True))


def test_a_core_that_runs_again_gives_the_same_bits() -> None:
    run_on_ranks(2, made_again)
