"""How many layers each stage has, by hand and against what every split must keep."""

from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.stages import even_sizes, num_rounds, schedule_name, stage_sizes
from tests.config.example import dense

PP, ROUNDS = "parallel.pipeline_model_parallel_size", "parallel.num_virtual_stages_per_pipeline_rank"
PER_STAGE, LAYOUT = "parallel.num_layers_per_virtual_pipeline_stage", "parallel.pipeline_model_parallel_layout"
FIRST, LAST = "parallel.decoder_first_pipeline_num_layers", "parallel.decoder_last_pipeline_num_layers"
EMBEDDING = "parallel.account_for_embedding_in_pipeline_split"
LOSS = "parallel.account_for_loss_in_pipeline_split"
SCHEDULE = "parallel.pipeline_schedule"
GROUP = "parallel.microbatch_group_size_per_virtual_pipeline_stage"
LAYERS, ENCODER = "model.num_layers", "model.encoder_num_layers"


def sizes(changes: dict[str, Any]) -> list[int]:
    run = dense(changes)
    return stage_sizes(run.model, run.parallel)


def test_even_sizes_by_hand() -> None:
    # one left over: to a middle stage; two: both middle ones; three: the first as well, never the last
    assert even_sizes(9, 4) == [2, 3, 2, 2]
    assert even_sizes(10, 4) == [2, 3, 3, 2]
    assert even_sizes(11, 4) == [3, 3, 3, 2]
    assert even_sizes(3, 2) == [2, 1]
    assert even_sizes(5, 1) == [5]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [8]),
        ({PP: 4}, [2, 2, 2, 2]),
        ({PP: 2, ROUNDS: 2}, [2, 2, 2, 2]),
        ({PP: 2, ROUNDS: 3}, [1, 2, 2, 1, 1, 1]),
        ({PP: 2, PER_STAGE: 2}, [2, 2, 2, 2]),
        ({PP: 2, PER_STAGE: 4}, [4, 4]),
        ({PER_STAGE: 4}, [4, 4]),
        ({PP: 2, ENCODER: 4, ROUNDS: 3}, [2, 2, 2, 2, 2, 2]),
        # the ends count as layers: 10 on 5 stages, 10 on 10
        ({PP: 5, EMBEDDING: True, LOSS: True}, [1, 2, 2, 2, 1]),
        ({PP: 5, ROUNDS: 2, EMBEDDING: True, LOSS: True}, [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]),
        ({PP: 3, LOSS: True}, [3, 3, 2]),
        ({PP: 3, PER_STAGE: 1, EMBEDDING: True}, [0, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({PP: 3, FIRST: 2, LAST: 2}, [2, 4, 2]),
        ({PP: 3, FIRST: 4, LAST: 2, ROUNDS: 2}, [2, 1, 1, 2, 1, 1]),
        ({PP: 4, FIRST: 2}, [2, 2, 2, 2]),
        ({PP: 3, LAST: 2}, [3, 3, 2]),
        ({PP: 2, FIRST: 5, LAST: 3}, [5, 3]),
        ({PP: 2, FIRST: 5}, [5, 3]),
        ({PP: 2, LAYOUT: "E|ttt|t*5|L"}, [0, 3, 5, 0]),
        ({PP: 2, LAYOUT: "Et*5|t*3L"}, [5, 3]),
        ({PP: 2, ENCODER: 2, LAYOUT: "E|e|et*7|tL"}, [0, 1, 8, 1]),
    ],
)
def test_sizes_by_hand(changes: dict[str, Any], expected: list[int]) -> None:
    assert sizes({LAYERS: 8, **changes}) == expected


@pytest.mark.parametrize("layers", [4, 7, 12])
def test_every_split_keeps_all_layers_and_a_multiple_of_the_ranks(layers: int) -> None:
    for ranks in (1, 2, 3):
        for rounds in (1, 2, 3):
            for ends in ({}, {EMBEDDING: True}, {LOSS: True}, {EMBEDDING: True, LOSS: True}):
                stages = ranks * rounds
                if stages == 1 or layers + len(ends) < stages:
                    continue
                found = sizes({LAYERS: layers, PP: ranks, ROUNDS: rounds, **ends})
                assert sum(found) == layers and len(found) == stages
                counted = [found[0] + (EMBEDDING in ends), *found[1:-1], found[-1] + (LOSS in ends)]
                assert min(found) >= 0 and max(counted) - min(counted) <= 1


def schedule(changes: dict[str, Any]) -> tuple[int, str]:
    run = dense({LAYERS: 8, **changes})
    return num_rounds(run.model, run.parallel), schedule_name(run.model, run.parallel)


def test_the_schedule_follows_from_the_number_of_stages_unless_it_is_given() -> None:
    assert schedule({}) == schedule({PP: 2}) == schedule({PP: 2, ROUNDS: 1}) == (1, "1f1b")
    assert schedule({PP: 2, ROUNDS: 2}) == schedule({PP: 2, LAYOUT: "Et|t|t|t*5L"}) == (2, "interleaved")
    assert schedule({PP: 2, PER_STAGE: 1, GROUP: 3}) == (4, "interleaved")
    assert schedule({PP: 2, ROUNDS: 2, SCHEDULE: "sequential"}) == (2, "sequential")
    assert schedule({PP: 2, SCHEDULE: "1f1b_split"}) == (1, "1f1b_split")


# a change that is refused, its message, and the nearest change that passes
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {PP: 2, ROUNDS: 5},
        "--num-layers 8 cannot fill --pipeline-model-parallel-size 2 with 5 stages on each rank: each stage needs a "
        "layer; use 8 stages or fewer.",
        {PP: 2, ROUNDS: 4},
    ),
    (
        {PP: 2, PER_STAGE: 3},
        "--num-layers-per-virtual-pipeline-stage 3 on --pipeline-model-parallel-size 2 wants a multiple of 6 layers, "
        "but there are 8",
        {PP: 2, PER_STAGE: 2},
    ),
    (
        {PP: 2, PER_STAGE: 2, ROUNDS: 2},
        "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage both say which stage has "
        "which layers; leave one of them out.",
        {PP: 2, ROUNDS: 2},
    ),
    (
        {PP: 2, LAYOUT: "E|t*8L", EMBEDDING: True},
        "--pipeline-model-parallel-layout and --account-for-embedding-in-pipeline-split both say",
        {PP: 2, LAYOUT: "E|t*8L"},
    ),
    (
        {PP: 2, FIRST: 3, LOSS: True},
        "--decoder-first-pipeline-num-layers and --account-for-loss-in-pipeline-split both say",
        {PP: 2, FIRST: 3},
    ),
    (
        {PP: 2, LAYOUT: "Et|t*6|tL"},
        "--pipeline-model-parallel-layout Et|t*6|tL has 3 stages, which cannot be shared out over "
        "--pipeline-model-parallel-size 2; write a multiple of 2.",
        {PP: 3, LAYOUT: "Et|t*6|tL"},
    ),
    (
        {PP: 2, LAYOUT: "Et*3|t*4L"},
        "--pipeline-model-parallel-layout Et*3|t*4L has 7 times t, but --num-layers is 8; make them the same.",
        {PP: 2, LAYOUT: "Et*3|t*5L"},
    ),
    (
        {PP: 2, LAYOUT: "Ee|t*8L"},
        "has 1 times e, but --encoder-num-layers is 0; make them the same.",
        {PP: 2, LAYOUT: "Ee|t*8L", ENCODER: 1},
    ),
    (
        {PP: 3, FIRST: 3},
        "--decoder-first-pipeline-num-layers 3 would leave 5 of --num-layers 8 to 2 other pipeline ranks, which cannot "
        "share them evenly",
        {PP: 3, FIRST: 4},
    ),
    (
        {PP: 2, FIRST: 3, LAST: 4},
        "--decoder-first-pipeline-num-layers 3 and --decoder-last-pipeline-num-layers 4 would leave 1 of "
        "--num-layers 8 to 0 other pipeline ranks",
        {PP: 2, FIRST: 3, LAST: 5},
    ),
    (
        {PP: 2, FIRST: 5, ROUNDS: 2},
        "would leave 5 layers to pipeline rank 0, which cannot be cut into --num-virtual-stages-per-pipeline-rank 2",
        {PP: 2, FIRST: 6, ROUNDS: 2},
    ),
    (
        {FIRST: 5},
        "--decoder-first-pipeline-num-layers 5 has no effect with --pipeline-model-parallel-size 1",
        {FIRST: 5, PP: 2},
    ),
    (
        {PP: 2, LAST: 3, ENCODER: 2},
        "--decoder-last-pipeline-num-layers 3 does not say which layers of the encoder are meant",
        {PP: 2, LAST: 3},
    ),
    *[
        (
            {PP: 2, ROUNDS: 2, SCHEDULE: name},
            f"--pipeline-schedule {name} plays one stage on each rank, but the options make 2; use interleaved or "
            "sequential",
            {PP: 2, SCHEDULE: name},
        )
        for name in ("1f1b", "1f1b_split", "zb_h1")
    ],
    (
        {PP: 2, SCHEDULE: "interleaved"},
        "--pipeline-schedule interleaved plays several stages on each rank, but the options make one; give "
        "--num-virtual-stages-per-pipeline-rank 2 or more",
        {PP: 2, SCHEDULE: "interleaved", ROUNDS: 2},
    ),
    (
        {SCHEDULE: "1f1b_overlap"},
        "--pipeline-schedule 1f1b_overlap hides what travels between the ranks of experts, but",
        {SCHEDULE: "1f1b"},
    ),
    (
        {PP: 4, ROUNDS: 2, GROUP: 3},
        "--microbatch-group-size-per-virtual-pipeline-stage 3 is less than --pipeline-model-parallel-size 4",
        {PP: 4, ROUNDS: 2, GROUP: 4},
    ),
]


@pytest.mark.parametrize(("wrong", "message", "right"), CASES)
def test_what_does_not_fit_is_refused_with_its_way_out_and_its_neighbour_passes(
    wrong: dict[str, Any], message: str, right: dict[str, Any]
) -> None:
    dense({LAYERS: 8, **right})
    with pytest.raises(ConfigError) as caught:
        dense({LAYERS: 8, **wrong})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_saved_run_says_the_same_stages() -> None:
    run = dense({LAYERS: 8, PP: 2, LAYOUT: "E|t*7|t|L"})
    again = RunConfig.from_json(run.to_json())
    assert again == run and stage_sizes(again.model, again.parallel) == [0, 7, 1, 0]
