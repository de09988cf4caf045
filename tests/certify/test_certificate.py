"""The certificate holds a model to its promise, tells what cannot run, and notices a router that breaks it."""

import json
from pathlib import Path

import pytest

from megatron_moe.certify.certificate import Subject, certify
from megatron_moe.certify.layouts import LAYOUTS
from megatron_moe.config.errors import ConfigError
from tools.certify import main

COSINE = Path(__file__).parents[2] / "examples" / "router" / "cosine_router.py"

# decides by the row's place on this rank, which no two layouts agree on
BREAKER = """
import torch
from megatron_moe.moe.routers.top_k import TopKRouter


class ByPlace(TopKRouter):
    def forward(self, tokens, info):
        shift = (torch.arange(len(tokens))[:, None] + 1) % 2
        return super().forward(tokens.roll(1, dims=0) * shift + tokens, info)
"""


def test_a_router_from_outside_keeps_the_promise_on_two_ranks() -> None:
    rows = certify(
        Subject({"router_type": f"{COSINE}:CosineRouter", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.01}), max_ranks=2
    )
    assert [row.layout for row in rows] == [name for name, layout in LAYOUTS.items() if layout.ranks <= 2]
    assert all(row.equal and row.refused is None for row in rows)
    assert {"loss", "auxiliary losses", "gradient norm", "gradients", "weights"} == set(rows[0].errors)


def test_an_encoder_decoder_model_with_other_routers_in_each_stack_keeps_the_promise() -> None:
    model = {"encoder_num_layers": 3, "position_embedding_type": "relative", "activation": "geglu_tanh"}
    moe = {"router_type": "st_moe", "expert_capacity_factor": 1.0, "extra_ffn": "after", "aux_loss_coeff": 0.01}
    encoder = {"router_type": "expert_choice", "layer_freq": "1", "num_experts": 2}
    rows = certify(Subject(moe, model, encoder), max_ranks=2)
    assert len(rows) > 10 and all(row.equal and row.refused is None for row in rows)


def test_a_router_that_decides_by_place_is_caught(tmp_path: Path) -> None:
    file = tmp_path / "breaker.py"
    file.write_text(BREAKER)
    rows = {row.layout: row for row in certify(Subject({"router_type": f"{file}:ByPlace"}), max_ranks=2)}
    assert not rows["TP 2 with sequence parallelism"].equal
    assert (rows["CP 2"].max_relative_error or 0.0) > 1e-4
    assert rows["recomputation"].equal


def test_what_cannot_run_is_told_with_the_reason() -> None:
    rows = {row.layout: row for row in certify(Subject({"num_experts": 5}), max_ranks=2)}
    assert "--num-experts 5 cannot be split over" in (rows["EP 2"].refused or "")
    assert rows["EP 2"].max_relative_error is None and rows["EP 2"].equal
    assert rows["TP 2"].refused is None
    with pytest.raises(ConfigError, match="no such router"):
        certify(Subject({"router_type": "nobody"}))


def test_groups_of_two_samples_leave_out_layouts_that_cannot_hold_one() -> None:
    rows = certify(Subject({"routing_group_samples": 2, "expert_capacity_factor": 1.0}), max_ranks=1)
    assert [row.layout for row in rows] == ["micro-batches of 2", "micro-batches of 4", "recomputation"]
    assert all(row.equal for row in rows)


def test_the_command_writes_rows_and_says_what_was_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "certificate.json"
    assert main(["--max-ranks", "1", "--moe", "aux_loss_coeff=0.01", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["moe"]["aux_loss_coeff"] == 0.01
    assert all(row["max_relative_error"] < 1e-9 for row in found["rows"]) and found["rows"][0]["layout"]
    assert "| micro-batches of 2 |" in capsys.readouterr().out
    assert main(["--moe", "zzz=1"]) == 2
    assert "expected name=value" in capsys.readouterr().err
    file = tmp_path / "breaker.py"
    file.write_text(BREAKER)
    assert main(["--router", f"{file}:ByPlace", "--quick"]) == 1
