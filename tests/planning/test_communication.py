"""The formulas give what a whole recorded step sends, byte for byte and call for call, on every axis of every rank.

The recorded ranks compute on real tensors, for the number of rows of each expert is read on the host; what they would
receive is made up, and a router that loads all experts evenly keeps the numbers of rows what they would be.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.certify.layouts import CP, EP, ETP, PP, ROUNDS, TP
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, Inputs, Stream
from megatron_moe.models.build import build_stages, gpt_spec
from megatron_moe.parallel.recording import Tally
from megatron_moe.parallel.state import ParallelState
from megatron_moe.planning.communication import step_traffic
from megatron_moe.training.engine import Engine, grid_of

VOCAB, LENGTHS, BATCH = 61, {"encoder": 32, "decoder": 16}, 16
UNIFORM = f"{Path(__file__).parent / 'uniform_router.py'}:UniformRouter"
SPARSE = {"num_experts": 4, "layer_freq": "2", "ffn_hidden_size": 12, "router_type": UNIFORM, "router_topk": 2}
LOSSES = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}
PLACES = {"expert_capacity_factor": 2.0}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"moe": {**SPARSE, **LOSSES}},
    "sparse with places, shared expert and a dense layer": {
        "model": {"untie_embeddings_and_output_weights": True, "qk_layernorm": "projection"},
        "moe": {
            **SPARSE,
            **LOSSES,
            **PLACES,
            "token_drop_policy": "bpr",
            "shared_expert_intermediate_size": 8,
            "extra_ffn": "after",
            "allow_noncausal": True,
        },
    },
    "encoder-decoder": {
        "model": {"encoder_num_layers": 4, "position_embedding_type": "relative"},
        "moe": {**SPARSE, **LOSSES, "extra_ffn": "after"},
        "encoder_moe": {**SPARSE, **PLACES, "num_experts": 8, "layer_freq": "4"},
    },
}
ENDS = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
# ranks, fields of [parallel], samples of a microbatch
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one": (1, {}, 2),
    "TP 2": (2, {TP: 2}, 2),
    "TP 2 without sequence parallelism x DP 2": (4, {TP: 2, "sequence_parallel": False, ETP: 1}, 1),
    "CP 2 x DP 2": (4, {CP: 2}, 1),
    "PP 4 x DP 2": (8, {PP: 4}, 2),
    "PP 2, two stages a rank": (4, {PP: 2, ROUNDS: 2}, 1),
    "PP 2, embedding and head alone": (2, {PP: 2, ROUNDS: 3, **ENDS}, 2),
    "DP 4 without ZeRO-1": (4, {"use_distributed_optimizer": False}, 1),
    "DP 3, small buckets": (3, {"ddp_bucket_size": 900}, 1),
    "EP 4 x DP 2": (8, {EP: 4}, 1),
    "TP 2 x PP 2 x CP 2 x EP 2": (16, {TP: 2, PP: 2, CP: 2, EP: 2, ETP: 1}, 1),
    "PP 2 x EP 2 x ETP 2, split backward": (8, {PP: 2, EP: 2, ETP: 2, "pipeline_schedule": "1f1b_split"}, 2),
    "TP 2 x PP 2 x EP 4 x DP 4": (32, {TP: 2, PP: 2, EP: 4}, 1),
}


def _config(model: str, layout: str) -> RunConfig:
    known = MODELS[model]
    ranks, parallel, micro = LAYOUTS[layout]
    if "moe" not in known:
        parallel = {name: value for name, value in parallel.items() if name not in (EP, ETP)}
    batch = 48 if ranks % 3 == 0 else BATCH
    return RunConfig.from_dict(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 16,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 24,
                "vocab_size": VOCAB,
                "make_vocab_size_divisible_by": 8,
                **known.get("model", {}),
            },
            "moe": known.get("moe", {}),
            "encoder_moe": known.get("encoder_moe", {}),
            "parallel": parallel,
            "data": {"seq_length": LENGTHS["decoder"]},
            "training": {"global_batch_size": batch, "train_iters": 2, "micro_batch_size": micro},
            "optimizer": {"lr": 0.01},
        }
    )


def _batch(first: int, samples: int, lengths: dict[str, int]) -> Batch:
    """Whole samples without padding."""

    def inputs(length: int) -> Inputs:
        tokens = (torch.arange(samples * length).view(samples, length) * 7 + first) % VOCAB
        return Inputs(tokens, torch.arange(length).repeat(samples, 1), torch.zeros(samples, length, dtype=torch.int32))

    own = inputs(lengths["decoder"])
    decoder = Stream(
        own.tokens,
        own.position_ids,
        own.segments,
        labels=own.tokens,
        loss_mask=torch.ones(samples, lengths["decoder"]),
    )
    return Batch({"encoder": inputs(lengths["encoder"]), "decoder": decoder}, torch.arange(first, first + samples))


def _recorded(
    config: RunConfig, world_size: int, rank: int, lengths: dict[str, int] = LENGTHS
) -> dict[str, Tally]:
    """What the second step of a rank sends; the first also tells the stages what to expect."""
    state, tallies = ParallelState.recorded(grid_of(config, world_size), rank)
    engine = Engine(config, state, torch.device("cpu"), VOCAB)
    micro = config.training.micro_batch_size
    number = config.training.global_batch_size // (micro * state.dp.size)
    first = state.dp.rank * micro * number
    for step in range(2):
        for tally in tallies.values():
            tally.forget()
        batches = [_batch(first + at * micro, micro, lengths) for at in range(number)]
        if not config.model.encoder_num_layers:
            batches = [Batch({"decoder": batch.decoder}, batch.sample_ids) for batch in batches]
        engine.train_step(step, batches)
    return {axis: tally for axis, tally in tallies.items() if tally.calls}


def _ranks(world_size: int) -> list[int]:
    """The corners of the grid and some between."""
    return sorted({0, 1, world_size // 2, world_size - 1} & set(range(world_size)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_sends_what_the_formulas_say(model: str, layout: str) -> None:
    config, world_size = _config(model, layout), LAYOUTS[layout][0]
    for rank in _ranks(world_size):
        wanted = _recorded(config, world_size, rank)
        found = step_traffic(config, grid_of(config, world_size), rank, VOCAB, LENGTHS)
        assert found == wanted, f"rank {rank}"


@pytest.mark.parametrize("layout", ["TP 2", "TP 2 without sequence parallelism x DP 2"])
def test_rows_that_do_not_split_evenly_are_counted_too(layout: str) -> None:
    odd = {"encoder": 33, "decoder": 17}
    config, world_size = _config("encoder-decoder", layout), LAYOUTS[layout][0]
    if layout == "TP 2":
        config = replace(config, parallel=replace(config.parallel, expert_tensor_parallel_size=1))
    for rank in range(2):
        wanted = _recorded(config, world_size, rank, odd)
        assert step_traffic(config, grid_of(config, world_size), rank, VOCAB, odd) == wanted


@pytest.mark.parametrize("model", MODELS)
def test_no_message_is_larger_than_what_it_is_for(model: str) -> None:
    """A hidden state on tp and pp, keys and values on cp, a rank's rows on ep, a stage's weights on the rest."""
    config, world_size = _config(model, "TP 2 x PP 2 x CP 2 x EP 2"), 16
    grid = grid_of(config, world_size)
    hidden = max(LENGTHS.values()) // grid.cp * 16 * 4  # bytes of a sample's rows on one rank
    for rank in range(0, world_size, 3):
        state, _ = ParallelState.recorded(grid, rank)
        stages = build_stages(gpt_spec(config, VOCAB), state)
        weights = sum(weight.numel() * 4 for stage in stages for weight in stage.parameters())
        bound = {"tp": hidden, "pp": hidden, "pp_back": hidden, "cp": hidden, "ep": 2 * hidden // grid.tp}
        for axis, tally in step_traffic(config, grid, rank, VOCAB, LENGTHS).items():
            assert max(tally.largest.values()) <= bound.get(axis, weights), (rank, axis)


@pytest.mark.parametrize(
    ("section", "name", "value", "problem"),
    [
        ("parallel", "recompute_granularity", "full", "--recompute-granularity full"),
        ("parallel", "tp_comm_overlap", True, "--tp-comm-overlap"),
        ("moe", "router_type", "switch", "--moe-router-type switch"),
        ("moe", "token_dispatcher_type", "allgather", "--moe-token-dispatcher-type allgather"),
    ],
)
def test_what_has_no_formula_is_refused_by_name(section: str, name: str, value: object, problem: str) -> None:
    tables = _config("sparse", "TP 2 x PP 2 x EP 4 x DP 4").to_dict()
    tables[section][name] = value
    config = RunConfig.from_dict(tables, origin="saved")
    with pytest.raises(ConfigError, match=problem):
        step_traffic(config, grid_of(config, 32), 0, VOCAB)
