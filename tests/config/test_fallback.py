"""Other layouts for fewer ranks: the first that fits is used, and one that would never be used is refused."""

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.fallback import fit_world
from megatron_moe.config.run import RunConfig
from megatron_moe.config.world import check_world
from tests.config.example import DENSE_FLAGS, sparse

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
EP, CP = "parallel.expert_model_parallel_size", "parallel.context_parallel_size"
FALLBACK = "parallel.fallback_layouts"


def sizes(run: RunConfig, world_size: int) -> dict[str, int]:
    """What differs from 1, of the layout over so many ranks."""
    parallel = fit_world(run, world_size).parallel
    found = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "dp": parallel.data_parallel_size(world_size),
    }
    return {name: size for name, size in found.items() if size != 1}


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (16, {"tp": 2, "ep": 4, "dp": 8}),
        (8, {"tp": 2, "ep": 4, "dp": 4}),
        (4, {"tp": 2, "ep": 2, "dp": 2}),
        (2, {"ep": 2, "dp": 2}),
        (1, {}),
    ],
)
def test_the_first_that_fits_is_used(world_size: int, expected: dict[str, int]) -> None:
    # over tp 2 an expert's matrices are split too: 8 ranks hold one copy of the four shares
    run = sparse({TP: 2, EP: 4, FALLBACK: ["tp=2,ep=2", "ep=2", "tp=1"]})
    assert sizes(run, world_size) == expected
    fitted = fit_world(run, world_size)
    check_world(fitted, world_size)
    assert fitted.training == run.training and fitted.data == run.data and fitted.model == run.model


def test_what_only_the_given_layout_had_is_set_back_and_explained() -> None:
    given = {
        TP: 2, PP: 2, CP: 2, EP: 2,
        "parallel.cp_comm_type": "p2p",
        "parallel.sequence_parallel": True,
        "parallel.tp_comm_overlap": True,
        "parallel.num_virtual_stages_per_pipeline_rank": 2,
        "parallel.expert_rank_capacity_factor": 1.5,
        FALLBACK: ["tp=1"],
    }  # fmt: skip
    run = sparse(given)
    assert fit_world(run, 8) is run
    fitted = fit_world(run, 1)
    plain = sparse()
    assert fitted.parallel == plain.parallel
    assert fitted.origin(TP) == "fallback" and run.origin(TP) == "recipe"
    assert any(line.split()[:3] == ["context_parallel_size", "1", "fallback"] for line in fitted.explain().split("\n"))
    # what was saved by it is read back
    assert RunConfig.from_json(fitted.to_json()) == fitted


def test_without_fallbacks_and_where_none_fits_the_given_layout_is_blamed() -> None:
    with pytest.raises(ConfigError) as plain:
        fit_world(sparse({TP: 2}), 3)
    with pytest.raises(ConfigError) as caught:
        fit_world(sparse({TP: 4, FALLBACK: ["tp=2"]}), 3)
    assert str(plain.value).startswith("3 ranks cannot be shared out over --tensor-model-parallel-size 2")
    assert str(plain.value).endswith("or sizes whose product is 1 or 3.")
    assert str(caught.value).startswith("3 ranks cannot be shared out over --tensor-model-parallel-size 4")
    assert str(caught.value).endswith("None of --fallback-layouts tp=2 fits either.")


@pytest.mark.parametrize(
    "text", ["", "tp", "tp=", "tp=0", "tp=two", "dp=2", "tp=1,tp=1", "tp=1;pp=2", " tp=1", "tp=-1", "tp=1,"]
)
def test_what_is_no_layout_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="^--fallback-layouts .* is no size; expected some of tp, pp, cp, ep, etp"):
        sparse({TP: 2, FALLBACK: [text]})


def test_a_layout_that_the_model_cannot_be_cut_into_is_refused_before_it_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"^--fallback-layouts ep=3: --num-experts 8 cannot be split"):
        sparse({EP: 8, FALLBACK: ["ep=3"]})


@pytest.mark.parametrize(
    ("given", "fallbacks", "idle"),
    [
        ({TP: 2}, ["tp=2"], "tp=2"),  # the given one
        ({TP: 4}, ["tp=1", "tp=2"], "tp=2"),  # the one before is used everywhere
        ({}, ["ep=2"], "ep=2"),
    ],
)
def test_a_layout_that_no_number_of_ranks_would_use_is_refused(
    given: dict[str, int], fallbacks: list[str], idle: str
) -> None:
    with pytest.raises(ConfigError, match=f"^--fallback-layouts {idle} has no effect: no number of ranks"):
        sparse({**given, FALLBACK: fallbacks})


def test_a_larger_layout_counts_where_it_alone_shares_out_the_batch() -> None:
    # 6 ranks as tp 2 are three copies, which cannot share 8 samples; as tp 2 x cp 3 they are one
    run = sparse({TP: 2, "data.seq_length": 36, FALLBACK: ["tp=2,cp=3"]})
    assert sizes(run, 6) == {"tp": 2, "cp": 3}


def test_a_saved_run_may_carry_them_beside_another_layout() -> None:
    saved = sparse({TP: 2, FALLBACK: ["tp=1"]}).to_dict()
    saved["parallel"]["tensor_model_parallel_size"] = 1
    assert RunConfig.from_dict(saved, origin="checkpoint").parallel.fallback_layouts == ("tp=1",)


def test_flags_name_several() -> None:
    run = RunConfig.load([*DENSE_FLAGS, "--tensor-model-parallel-size", "4", "--fallback-layouts", "tp=2", "tp=1"])
    assert run.parallel.fallback_layouts == ("tp=2", "tp=1")
    assert sizes(run, 2) == {"tp": 2}
