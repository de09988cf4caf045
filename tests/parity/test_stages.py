"""However the layers are cut into stages, and however many of them a rank has, a model is what one process makes it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.certify.layouts import CP, EP, PP, ROUNDS, TP
from megatron_moe.certify.tiny_model import VOCAB, pairs, samples, tiny_config
from megatron_moe.certify.tiny_run import TOLERANCE, Outcome, alone, outcome_of, run_all, worst_difference
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine, grid_of

pytestmark = pytest.mark.timeout(600)

Tables = dict[str, Any]
LAYOUT, FIRST = "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers"
GROUP, SCHEDULE = "microbatch_group_size_per_virtual_pipeline_stage", "pipeline_schedule"

UNTIED = {"untie_embeddings_and_output_weights": True}
# relative positions are a parameter of every stage; the encoder's embedding stands in the middle once more
ENCODER = {
    "encoder_num_layers": 2,
    "position_embedding_type": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
DENSE, SPARSE = {"num_experts": 0}, {"router_type": "gshard", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}
MODELS: dict[str, tuple[Tables, Tables]] = {
    "dense": (DENSE, {}),
    "sparse, untied": (SPARSE, UNTIED),
    "dense encoder-decoder, untied": (DENSE, {**ENCODER, **UNTIED}),
    "sparse encoder-decoder": (SPARSE, ENCODER),
}
# by ranks: of both families; of decoders of four layers; of two layers of encoder and four of decoder
OF_ALL: dict[int, list[Tables]] = {
    1: [{ROUNDS: 2}],
    2: [{PP: 2, ROUNDS: 2, SCHEDULE: "sequential"}, {PP: 2, ROUNDS: 2, GROUP: 3}],
    4: [{PP: 2, ROUNDS: 2}, {PP: 2, CP: 2, ROUNDS: 2}],
}
OF_DECODERS: dict[int, list[Tables]] = {
    1: [{LAYOUT: "E|t|tttL"}],
    2: [{PP: 2, LAYOUT: "E|ttttL"}, {PP: 2, LAYOUT: "E|ttt|t|L"}, {PP: 2, FIRST: 3}],
    4: [{PP: 4, LAYOUT: "E|tt|tt|L"}, {TP: 2, PP: 2, LAYOUT: "Ett|(t|)*2L"}],
}
OF_BOTH: dict[int, list[Tables]] = {
    1: [{LAYOUT: "Ee|e|tttt|L"}],
    2: [{PP: 2, LAYOUT: "E|eettttL"}, {PP: 2, LAYOUT: "Eee|ttt|t|L"}, {PP: 2, LAYOUT: "E|ee|t|tttL"}],
    4: [{PP: 4, LAYOUT: "Eee|t|ttt|L"}, {TP: 2, PP: 2, LAYOUT: "E|eet|ttt|L"}],
}


def cases(ranks: int) -> list[tuple[str, Tables]]:
    found = []
    for model, (moe, sizes) in MODELS.items():
        own = OF_BOTH if "encoder_num_layers" in sizes else OF_DECODERS
        found += [(model, layout) for layout in (*OF_ALL[ranks], *own[ranks])]
        if moe is SPARSE and ranks == 4:
            found.append((model, {PP: 2, ROUNDS: 2, EP: 2}))
    return found


def config_of(model: str, parallel: Tables) -> RunConfig:
    moe, sizes = MODELS[model]
    return tiny_config(moe, parallel, sizes, encoder_moe=moe if "encoder_num_layers" in sizes else None)


@pytest.fixture(scope="module")
def wanted() -> dict[str, Outcome]:
    return {model: alone(config_of(model, {})) for model in MODELS}


@pytest.mark.parametrize("ranks", OF_ALL)
def test_every_way_of_cutting_equals_one_process(ranks: int, wanted: dict[str, Outcome]) -> None:
    answers = run_on_ranks(ranks, run_all, [config_of(*case) for case in cases(ranks)])
    for number, (model, layout) in enumerate(cases(ranks)):
        differences = worst_difference(outcome_of([rank[number] for rank in answers]), wanted[model])
        assert max(differences.values()) < TOLERANCE, f"{model} on {layout}: {differences}"


def evaluate_all(rank: int, world_size: int, configs: Sequence[RunConfig]) -> list[float]:
    """The loss of one global batch that nothing is learnt from."""
    found = []
    for config in configs:
        state = ParallelState.alone() if world_size == 1 else ParallelState.distributed(grid_of(config, world_size))
        draw = pairs if config.model.encoder_num_layers else samples
        engine = Engine(config, state, torch.device("cpu"), VOCAB)
        found.append(engine.evaluate([draw([number]) for number in range(3)])[0].loss)
    return found


def test_evaluation_goes_round_as_well() -> None:
    layouts = {
        "dense": [{PP: 2, ROUNDS: 2}, {PP: 2, LAYOUT: "E|ttt|t|L"}],
        "sparse encoder-decoder": [{PP: 2, ROUNDS: 3}, {PP: 2, LAYOUT: "E|ee|t|tttL"}],
    }
    configs = [config_of(model, layout) for model, found in layouts.items() for layout in found]
    wanted = evaluate_all(0, 1, [config_of(model, {}) for model, found in layouts.items() for _ in found])
    for found in run_on_ranks(2, evaluate_all, configs):
        assert found == pytest.approx(wanted, rel=TOLERANCE)
