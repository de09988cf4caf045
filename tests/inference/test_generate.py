"""Decoding gives the tokens of repeated whole passes, on every layout, whatever runs beside."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.config.errors import ConfigError, DataError, NonFiniteError
from megatron_moe.config.run import RunConfig
from megatron_moe.inference.generate import Generator
from megatron_moe.inference.sampling import Sampling
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of
from tests.inference.tiny_models import CPU, VOCAB, Tables, build, generator_of, greedy_by_whole_passes, tiny_run

NEW = 6
GREEDY, WARM = Sampling(greedy=True), Sampling(temperature=1.5, top_k=40, top_p=0.95)
# two of one length, one longer, one of a single token
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9], [7]]

MODELS: dict[str, tuple[Tables, Tables]] = {
    "dense": ({"num_experts": 0}, {}),
    "top_k": ({}, {"qk_layernorm": "projection", "untie_embeddings_and_output_weights": True}),
    "top_k with capacity": ({"expert_capacity_factor": 0.7, "shared_expert_intermediate_size": 8}, {}),
    "groups of two samples": ({"expert_capacity_factor": 0.5, "routing_group_samples": 2}, {}),
    "switch": ({"router_type": "switch", "router_topk": 1, "layer_freq": "1"}, {"qk_layernorm": "head"}),
    "st_moe": ({"router_type": "st_moe", "router_options": {"eval_policy": "random"}}, {}),
}


def answers(generator: Generator, sampling: Sampling, **changes: Any) -> list[list[int]]:
    return generator.generate(PROMPTS, NEW, sampling, **{"eod_id": None, "seed": 7, **changes})


@pytest.mark.parametrize("name", ["dense", "top_k", "switch"])
def test_greedy_tokens_are_those_of_repeated_whole_passes(name: str) -> None:
    run = tiny_run(*MODELS[name])
    (stage,) = build(run, ParallelState.alone())
    wanted = [greedy_by_whole_passes(stage, prompt, NEW) for prompt in PROMPTS]
    assert answers(generator_of(run), GREEDY) == wanted
    assert len({token for tokens in wanted for token in tokens}) > NEW  # a model that repeats itself shows nothing


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_has_the_same_answer_alone_and_in_company(name: str, sampling: Sampling) -> None:
    generator = generator_of(tiny_run(*MODELS[name]))
    together = answers(generator, sampling)
    alone = [
        generator.generate([prompt], NEW, sampling, eod_id=None, seed=7, first_sample=number)[0]
        for number, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert answers(generator_of(tiny_run(*MODELS[name]), max_batch=1), sampling) == together


def test_seeds_and_samples_draw_differently_and_repeat() -> None:
    generator = generator_of(tiny_run())
    same = [[3, 1, 4]] * 3
    first = generator.generate(same, NEW, WARM, eod_id=None, seed=1)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert generator.generate(same, NEW, WARM, eod_id=None, seed=1) == first
    assert generator.generate(same, NEW, WARM, eod_id=None, seed=2) != first


def test_a_router_that_draws_in_evaluation_follows_the_seed() -> None:
    generator = generator_of(tiny_run(*MODELS["st_moe"]))
    assert answers(generator, GREEDY) == answers(generator, GREEDY)
    assert answers(generator, GREEDY) != answers(generator, GREEDY, seed=8)


def test_an_answer_ends_before_the_end_of_the_document() -> None:
    """Of two prompts that run together one ends early; the other goes on as if it were alone."""
    generator = generator_of(tiny_run())
    free = answers(generator, WARM)
    first, other = free[0], free[2]
    eod = next(token for token in first[1:] if token not in other)
    ended = answers(generator, WARM, eod_id=eod)
    assert ended[0] == first[: first.index(eod)]
    assert ended[2] == other


def test_an_answer_may_be_empty() -> None:
    generator = generator_of(tiny_run())
    (free,) = generator.generate([[3, 1]], 1, GREEDY, eod_id=None, seed=1)
    assert generator.generate([[3, 1]], 5, GREEDY, eod_id=free[0], seed=1) == [[]]
    assert generator.generate([], 5, GREEDY, eod_id=None, seed=1) == []


def test_only_ids_below_the_vocabulary_size_are_chosen() -> None:
    """Rows that only pad the embedding have weights too."""
    run = tiny_run()
    state = ParallelState.alone()
    stages = build(run, state)
    few = Generator(stages, state, replace(stages[0].spec, vocab_size=12), CPU)
    tokens = few.generate([[3, 1, 4]], 40, Sampling(temperature=5.0), eod_id=None, seed=1)[0]
    assert max(tokens) < 12
    assert max(generator_of(run).generate([[3, 1, 4]], 40, Sampling(temperature=5.0), eod_id=None, seed=1)[0]) >= 12


@pytest.mark.parametrize(
    ("prompts", "count", "error", "named"),
    [
        ([[1], []], 3, DataError, "prompt 2 has no tokens"),
        ([[1, VOCAB]], 3, DataError, f"holds id {VOCAB}, outside 0..{VOCAB - 1}"),
        ([[-1]], 3, DataError, "holds id -1"),
        ([[1]], 0, ConfigError, "--max-new-tokens 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    prompts: list[list[int]], count: int, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        generator_of(tiny_run()).generate(prompts, count, GREEDY, eod_id=None, seed=1)


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size 0"):
        generator_of(tiny_run(), max_batch=0)


def test_context_parallelism_is_refused_with_the_way_out() -> None:
    state, _ = ParallelState.recorded(Grid(2, cp=2), 0)
    stages = build(tiny_run(), ParallelState.alone())
    with pytest.raises(ConfigError, match="--context-parallel-size 2 .* use 1"):
        Generator(stages, state, stages[0].spec, CPU)


def test_logits_that_are_not_finite_end_with_an_error() -> None:
    state = ParallelState.alone()
    stages = build(tiny_run(), state)
    with torch.no_grad():
        stages[0].final_norm.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="position 2 .*--ckpt-step"):
        Generator(stages, state, stages[0].spec, CPU).generate([[3, 1]], 2, WARM, eod_id=None, seed=1)


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
NODE = "expert_model_parallel_ranks_per_node"
# by ranks; data parallelism is what is left of them
LAYOUTS: dict[int, list[Tables]] = {
    2: [{}, {TP: 2}, {PP: 2}, {EP: 2}, {ETP: 2}, {TP: 2, EP: 2, ETP: 1}],
    4: [
        {TP: 2, EP: 2},
        {TP: 2, PP: 2},
        {EP: 4},
        {TP: 2, EP: 4, ETP: 1},
        {TP: 2, EP: 4, ETP: 1, NODE: 2},
        {EP: 2, ETP: 2},
        {TP: 2, PP: 2, EP: 2, ETP: 1},
        {PP: 4},
    ],
}
# by ranks: every collective costs a millisecond where ranks outnumber cores
MODELS_ON: dict[int, list[str]] = {
    2: ["dense", "top_k", "top_k with capacity", "groups of two samples"],
    4: ["top_k", "top_k with capacity"],
}
DISPATCHERS = ("allgather", "one_per_rank")
Answers = list[list[int]]


def some_answers(generator: Generator) -> tuple[Answers, Answers]:
    """Two prompts that run together and a longer one, drawn; and one prompt of a single token."""
    drawn = generator.generate([[9, 2, 6], [5, 3, 5, 8, 9], [3, 1, 4]], 4, WARM, eod_id=9, seed=7)
    return drawn, generator.generate([[7]], 3, GREEDY, eod_id=None, seed=7)


def cases_on(ranks: int, layout: Tables) -> dict[str, RunConfig]:
    """Everything that runs on one layout."""
    expert = bool(layout.keys() & {EP, ETP})
    names = [name for name in MODELS_ON[ranks] if not (expert and name == "dense")]
    found = {name: tiny_run(*MODELS[name], layout) for name in names}
    if layout == {EP: ranks}:
        found |= {name: tiny_run({"token_dispatcher_type": name}, {}, layout) for name in DISPATCHERS}
    return found


def generate_on_rank(
    rank: int, world_size: int, layouts: Sequence[Sequence[RunConfig]]
) -> list[list[tuple[Answers, Answers]]]:
    found = []
    for runs in layouts:
        state = ParallelState.distributed(grid_of(runs[0], world_size))
        found.append([some_answers(generator_of(run, state)) for run in runs])
    return found


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_gives_the_tokens_of_one_process(ranks: int) -> None:
    cases = [cases_on(ranks, layout) for layout in LAYOUTS[ranks]]
    alone = {name: some_answers(generator_of(run)) for runs in cases for name, run in runs.items()}
    for told in run_on_ranks(ranks, generate_on_rank, [list(runs.values()) for runs in cases]):
        for runs, found in zip(cases, told, strict=True):
            for (name, run), answer in zip(runs.items(), found, strict=True):
                assert answer == alone[name], (name, run.parallel)


def diverged_on_rank(rank: int, world_size: int) -> str:
    run = tiny_run(parallel={TP: 2, PP: 2})
    state = ParallelState.distributed(grid_of(run, world_size))
    stages = build(run, state)
    with torch.no_grad():
        for parameter in stages[0].layers.parameters():
            parameter[...] = float("inf")
    try:
        Generator(stages, state, stages[0].spec, CPU).generate([[3, 1]], 2, WARM, eod_id=None, seed=1)
    except NonFiniteError as error:
        return str(error)
    return "no error"


def test_all_ranks_raise_together_when_logits_are_not_finite() -> None:
    assert ["position 2" in text for text in run_on_ranks(4, diverged_on_rank)] == [True] * 4
