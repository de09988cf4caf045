"""The certificate holds a model to its promise, tells what cannot run, and notices a router that breaks it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.certify.certificate import KINDS, Row, Subject, _config, certify, check_where
from megatron_moe.certify.layouts import LAYOUTS, PP, Layout
from megatron_moe.certify.tiny_model import GLOBAL_BATCH
from megatron_moe.certify.tiny_run import Outcome, RankOutcome, Where, outcome_of, worst_difference
from megatron_moe.config.errors import ConfigError, ReplicaError
from tools.certify import main, moe_fields

EXAMPLES = Path(__file__).parents[2] / "examples"
COSINE = EXAMPLES / "router" / "cosine_router.py"
RECIPE = EXAMPLES / "st_moe" / "recipe.toml"

# decides by the row's place on this rank, which no two layouts agree on
BREAKER = """
import torch
from megatron_moe.moe.routers.top_k import TopKRouter


class ByPlace(TopKRouter):
    def forward(self, tokens, info):
        shift = (torch.arange(len(tokens))[:, None] + 1) % 2
        return super().forward(tokens.roll(1, dims=0) * shift + tokens, info)
"""


def test_ranks_that_disagree_are_told() -> None:
    found = RankOutcome([2.0], [{}], [1.0], [], [])
    assert outcome_of([found, found]).losses == [2.0]
    with pytest.raises(ReplicaError, match=r"rank 1 found losses \[2\.0\] and gradient norms \[1\.5\], rank 0"):
        outcome_of([found, replace(found, norms=[1.5])])


def test_a_router_from_outside_keeps_the_promise_on_two_ranks() -> None:
    rows = certify(
        Subject({"router_type": f"{COSINE}:CosineRouter", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.01}), max_ranks=2
    )
    assert [row.layout for row in rows] == [name for name, layout in LAYOUTS.items() if layout.ranks <= 2]
    assert all(row.equal and row.refused is None for row in rows)
    assert set(KINDS) == set(rows[0].errors)
    assert all(row.seconds > 0 for row in rows)


def test_an_encoder_decoder_model_with_other_routers_in_each_stack_keeps_the_promise() -> None:
    model = {"encoder_num_layers": 3, "position_embedding_type": "relative", "activation": "geglu_tanh"}
    moe = {"router_type": "st_moe", "expert_capacity_factor": 1.0, "extra_ffn": "after", "aux_loss_coeff": 0.01}
    encoder = {"router_type": "expert_choice", "layer_freq": "1", "num_experts": 2}
    rows = certify(Subject(moe, model, encoder), max_ranks=2)
    assert len(rows) > 10 and all(row.equal and row.refused is None for row in rows)


def test_a_router_that_decides_by_place_is_caught(tmp_path: Path) -> None:
    file = tmp_path / "breaker.py"
    file.write_text(BREAKER)
    some = {name: LAYOUTS[name] for name in ("recomputation", "TP 2 with sequence parallelism", "CP 2")}
    rows = {row.layout: row for row in certify(Subject({"router_type": f"{file}:ByPlace"}), some)}
    assert not rows["TP 2 with sequence parallelism"].equal
    assert (rows["CP 2"].max_relative_error or 0.0) > 1e-4
    assert rows["recomputation"].equal


def test_what_cannot_run_is_told_with_the_reason() -> None:
    some = {name: LAYOUTS[name] for name in ("TP 2", "EP 2")}
    rows = {row.layout: row for row in certify(Subject({"num_experts": 5}), some)}
    assert "--num-experts 5 cannot be split over" in (rows["EP 2"].refused or "")
    assert rows["EP 2"].max_relative_error is None and rows["EP 2"].equal
    assert rows["TP 2"].refused is None
    with pytest.raises(ConfigError, match="no such router"):
        certify(Subject({"router_type": "nobody"}))


def test_groups_of_two_samples_leave_out_layouts_that_cannot_hold_one() -> None:
    rows = certify(Subject({"routing_group_samples": 2, "expert_capacity_factor": 1.0}), max_ranks=1)
    assert [row.layout for row in rows] == [name for name, layout in LAYOUTS.items() if layout.ranks == 1]
    assert all(row.equal and row.refused is None for row in rows)
    # nor those whose ranks would not have a microbatch each
    assert certify(Subject({}), {"DP 4": Layout(4, {}, 2)}) == []
    too_small = [name for name, layout in LAYOUTS.items() if layout.samples_of_a_rank(GLOBAL_BATCH) < 2]
    assert [name for name in too_small if "," not in name] == ["EP 4", "EP 4 as 2 nodes of 2", "EP 2 x ETP 2"]


def test_experts_that_cannot_be_cut_stand_whole_on_tensor_ranks_and_nowhere_else() -> None:
    memory = Subject({"router_type": "vanilla_memory", "activation": "relu"})
    assert _config(memory, LAYOUTS["TP 2"]).parallel.expert_tensor == 1
    with pytest.raises(ConfigError, match="give --expert-tensor-parallel-size 1"):
        _config(memory, LAYOUTS["ETP 2"])


def test_an_uneven_layout_follows_the_model() -> None:
    def written(encoder_layers: int) -> str | None:
        model = {"encoder_num_layers": encoder_layers}
        layout = LAYOUTS["PP 2 interleaved, uneven"]
        return _config(Subject({}, model), layout).parallel.pipeline_model_parallel_layout

    assert (written(0), written(3)) == ("E|t|tt|tL", "E|e|eettt|tL")


def test_the_worst_figure_of_a_run_counts() -> None:
    wanted = Outcome([2.0, 4.0], [{"z": 1.0}, {"z": 2.0}], [1.0, 1.0], {"g": np.ones(3)}, {"w": np.ones(3)})
    assert set(worst_difference(wanted, wanted).values()) == {0.0}
    found = Outcome(
        [2.0, 5.0], [{"z": 1.0}, {"z": 1.0}], [0.9, 1.0], {"g": np.array([1, 1, 3.002])}, {"w": np.array([1, 2.001, 1])}
    )
    errors = worst_difference(found, wanted)
    assert errors == {
        "loss": pytest.approx(0.25),
        "auxiliary losses": pytest.approx(0.5),
        "gradient norm": pytest.approx(0.1),
        "gradients": pytest.approx(2.0),
        "weights": pytest.approx(1.0),
    }
    assert not Row("TP 2", {**errors, "loss": 0.0}).equal
    assert Row("TP 2", errors, tolerances=dict.fromkeys(errors, 2.1)).equal
    assert not Row("TP 2", errors, tolerances={**dict.fromkeys(errors, 2.1), "loss": 0.2}).equal
    # of what is zero the difference itself
    nothing = replace(wanted, aux_losses=[{"z": 0.0}, {"z": 0.0}])
    assert worst_difference(wanted, nothing)["auxiliary losses"] == 2.0
    # one that is not whole, and one that is not there
    for weights in ({"w": np.array([1, np.nan, 1])}, {}):
        assert worst_difference(replace(wanted, weights=weights), wanted)["weights"] == float("inf")
    # what is tiny beside the rest of the model is measured against the rest: 1e-4 / (1e-6 + 1e-3)
    small, large = {"a": np.array([1e-6]), "b": np.ones(1)}, {"a": np.array([1.01e-4]), "b": np.ones(1)}
    tiny = worst_difference(replace(wanted, weights=large), replace(wanted, weights=small))
    assert tiny["weights"] == pytest.approx(1e-4 / 1.001e-3)


FEW = {"micro-batches of 2": Layout(1, {}, 2), "PP 2": Layout(2, {PP: 2})}


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.certify.layouts", lambda extent: FEW)


@pytest.mark.usefixtures("_few")
def test_the_command_writes_rows_and_says_what_was_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "certificate.json"
    assert main(["--family", "all", "--moe", "aux_loss_coeff=0.01", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["moe"]["aux_loss_coeff"] == 0.01 and found["router"] == "top_k"
    assert found["subjects"]["encoder-decoder"]["model"]["encoder_num_layers"] == 4
    assert found["versions"]["torch"] and found["seconds"] > 0
    assert [(row["family"], row["layout"]) for row in found["rows"]] == [
        (family, layout) for family in ("decoder-only", "encoder-decoder") for layout in FEW
    ]
    assert all(row["equal"] and row["max_relative_error"] < 1e-9 and row["seconds"] > 0 for row in found["rows"])
    out = capsys.readouterr().out
    assert out.count("| micro-batches of 2 |") == 2
    assert "top_k, encoder-decoder, float64: 2 layouts, 0 differ, 0 cannot run" in out
    assert main(["--brief", "--moe", "aux_loss_coeff=0.02"]) == 0
    out = capsys.readouterr().out
    assert "| layout | decoder-only |" in out and "gradient norm" not in out
    assert out.count("| micro-batches of 2 |") == 1
    assert main(["--moe", "zzz=1"]) == 2
    assert main(["--moe", "capacity_includes_k=maybe"]) == 2
    assert moe_fields("top_k", ["router_pre_softmax=true", "z_loss_coeff=0.1"]).items() >= {
        ("router_pre_softmax", True),
        ("z_loss_coeff", 0.1),
    }
    assert "expected name=value" in capsys.readouterr().err


def test_the_command_fails_for_a_router_that_breaks_the_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "breaker.py"
    file.write_text(BREAKER)
    monkeypatch.setattr("tools.certify.layouts", lambda extent: {"CP 2": LAYOUTS["CP 2"]})
    assert main(["--router", f"{file}:ByPlace"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.usefixtures("_few")
def test_the_command_takes_a_recipe_and_a_narrow_type(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--recipe", str(RECIPE)]
    assert main([*recipe, "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "moe.min_capacity: 4 -> 1" in out and "| *allowed* |" in out and "encoder-decoder, bf16" in out
    assert main([*recipe, "--router", "top_k"]) == 2
    assert main([*recipe, "--family", "all"]) == 2
    assert "the recipe says that" in capsys.readouterr().err


def test_what_the_ranks_cannot_run_on_is_refused_with_the_way_out() -> None:
    assert check_where(Where(), 4) == 4
    with pytest.raises(ConfigError, match="--backend nccl --device cpu: .* use --backend gloo"):
        check_where(Where("cpu", "nccl"), 1)


@pytest.mark.parametrize(("cards", "backend", "problem"), [(0, "gloo", "no GPU here"), (1, "nccl", "--max-ranks 1,")])
def test_cards_that_are_missing_are_told(
    cards: int, backend: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_moe.certify.certificate._cards", lambda rank, world_size: cards)
    with pytest.raises(ConfigError, match=problem):
        check_where(Where("cuda", backend), 2)
