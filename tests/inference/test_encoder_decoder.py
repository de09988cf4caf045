"""An encoder-decoder model decodes with a cache what repeated whole passes say, on every layout."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.config.run import RunConfig
from megatron_moe.inference.generate import Generator
from megatron_moe.inference.sampling import Sampling
from megatron_moe.models.gpt import GPTStage
from megatron_moe.models.whole import plain_context
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of
from tests.inference.tiny_models import CPU, build, generator_of, tiny_run

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
START = 7
PROMPTS = [[5, 9, 2, 40, 11], [3], [8, 8, 1, 30, 22, 17, 6]]
RELATIVE = {
    "position_embedding_type": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
GREEDY, WARM = Sampling(greedy=True), Sampling(temperature=1.5)
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{TP: 2}, {PP: 2}, {EP: 2}],
    4: [{EP: 4}, {PP: 4}, {TP: 2, PP: 2}, {TP: 2, EP: 2, ETP: 1}],
}


def runs(parallel: dict[str, Any] | None = None) -> list[RunConfig]:
    """A sparse encoder and decoder with relative positions, tied; an encoder whose experts choose, untied."""
    sparse = {"num_experts": 4, "layer_freq": "2", "ffn_hidden_size": 12, "router_type": "st_moe"}
    first = tiny_run({**sparse, "extra_ffn": "after"}, {"encoder_num_layers": 2, **RELATIVE}, parallel)
    second = tiny_run({}, {"encoder_num_layers": 3, "untie_embeddings_and_output_weights": True}, parallel)
    tables = [run.to_dict() for run in (first, second)]
    tables[0]["encoder_moe"].update(sparse)
    tables[1]["encoder_moe"].update({**sparse, "router_type": "expert_choice"})
    # as read from a checkpoint: options without effect are no error
    return [RunConfig.from_dict(table, origin="checkpoint") for table in tables]


def greedy_by_whole_passes(stage: GPTStage, prompt: Sequence[int], count: int) -> list[int]:
    """The encoder and all of the decoder again for each token."""
    said = [START]
    source = plain_context(torch.tensor([prompt])).view
    for _ in range(count):
        with torch.no_grad():
            output = stage({}, replace(plain_context(torch.tensor([said])), source=source))
        said.append(int(output.tensors["logits"][-1, 0, : stage.spec.vocab_size].argmax()))
    return said[1:]


@pytest.mark.parametrize("number", [0, 1])
def test_greedy_tokens_are_those_of_repeated_whole_passes(number: int) -> None:
    run = runs()[number]
    (stage,) = build(run, ParallelState.alone())
    found = generator_of(run, start_id=START).generate(PROMPTS, 9, GREEDY, eod_id=None, seed=1)
    wanted = [greedy_by_whole_passes(stage, prompt, 9) for prompt in PROMPTS]
    assert found == wanted
    assert len({tuple(answer) for answer in found}) == len(PROMPTS) and max(len(set(a)) for a in found) > 2


def test_a_prompt_has_the_same_answer_alone_and_in_company() -> None:
    generator = generator_of(runs()[0], start_id=START)
    prompts = [PROMPTS[0], [1, 2, 3, 4, 5]]
    together = generator.generate(prompts, 6, WARM, eod_id=None, seed=3)
    alone = [generator.generate([p], 6, WARM, eod_id=None, seed=3, first_sample=i)[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert generator.generate(prompts, 6, WARM, eod_id=None, seed=4) != together


def test_the_decoder_wants_a_first_token_and_only_with_an_encoder() -> None:
    for run, start in ((runs()[0], None), (tiny_run(), START)):
        stages = build(run, ParallelState.alone())
        with pytest.raises(ValueError, match="wants start_id"):
            Generator(stages, ParallelState.alone(), stages[0].spec, CPU, start_id=start)


def answers_on_rank(rank: int, world_size: int, layouts: Sequence[Sequence[RunConfig]]) -> list[list[Any]]:
    found = []
    for models in layouts:
        state = ParallelState.distributed(grid_of(models[0], world_size))
        found.append([answers_of(run, state) for run in models])
    return found


def answers_of(run: RunConfig, state: ParallelState | None = None) -> list[Any]:
    generator = generator_of(run, state, start_id=START)
    return [generator.generate(PROMPTS, 7, sampling, eod_id=None, seed=2) for sampling in (GREEDY, WARM)]


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_gives_the_tokens_of_one_process(ranks: int) -> None:
    alone = [answers_of(run) for run in runs()]
    for told in run_on_ranks(ranks, answers_on_rank, [runs(layout) for layout in LAYOUTS[ranks]]):
        for layout, found in zip(LAYOUTS[ranks], told, strict=True):
            assert found == alone, layout
