"""The list of routers comes from the code, and its promises are measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.inference.labels import Labels, measure_labels
from megatron_moe.moe.methods import METHODS
from megatron_moe.report.router_list import example_config, router_line, router_lines
from tools.list_routers import main

COSINE = Path(__file__).parents[2] / "examples" / "router" / "cosine_router.py"

# chooses by the sequence's last token, and says that it does not
LIAR = """
import torch
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.routers.top_k import TopKRouter


class Liar(TopKRouter):
    def forward(self, tokens, info):
        last = torch.zeros_like(tokens).index_copy(0, info.sequences, tokens)
        return super().forward(tokens + last[info.sequences], info)


class Silent(TopKRouter):
    facts = None
"""
# a little of the last token, at all places but the first; and of the other samples, in training only
FAINT = """
import torch
from megatron_moe.moe.routers.top_k import TopKRouter


class Faint(TopKRouter):
    def forward(self, tokens, info):
        last = torch.zeros_like(tokens).index_copy(0, info.sequences, tokens)
        return super().forward(tokens + 1e-5 * last[info.sequences] * (info.positions > 0)[:, None], info)


class Neighbour(TopKRouter):
    def forward(self, tokens, info):
        first = tokens[info.positions == 0].mean(dim=0) if info.train else 0.0
        return super().forward(tokens + first, info)
"""


@pytest.mark.parametrize("name", METHODS)
def test_what_a_router_declares_is_what_is_measured(name: str) -> None:
    line = router_line(name)
    labels = measure_labels(example_config(name))
    assert (labels.decoder_safe, labels.batch_invariant) == (line.causal, line.batch_independent)
    # who decides for each token alone can decode
    assert labels.generation_safe or not (line.causal and line.batch_independent)


def test_every_line_is_filled() -> None:
    for line in router_lines():
        empty = [name for name, value in line.as_dict().items() if value == ""]
        assert not empty, line.name
        assert "arXiv:" in line.paper, line.name


def test_a_router_that_sees_the_future_is_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "liar.py"
    file.write_text(LIAR)
    assert measure_labels(example_config(f"{file}:Liar")) == Labels(False, True, False)
    assert main(["--router", f"{file}:Liar", "--check"]) == 1
    assert "declares decoder_safe True and is measured False" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"Silent says nothing of itself; give its class `facts"):
        router_line(f"{file}:Silent")


def test_a_faint_leak_is_found_and_one_in_training_only(tmp_path: Path) -> None:
    file = tmp_path / "faint.py"
    file.write_text(FAINT)
    assert measure_labels(example_config(f"{file}:Faint")) == Labels(False, True, False)
    assert measure_labels(example_config(f"{file}:Neighbour")) == Labels(True, False, True)


def test_what_cannot_be_decoded_is_not_generation_safe() -> None:
    moe = replace(example_config("mixture_of_depths"), router_options={"capacity": "0.3", "inference": "top_k"})
    assert measure_labels(moe) == Labels(False, True, False)


def test_a_line_says_what_the_class_says() -> None:
    line = router_line("remoe")
    assert (line.scores, line.weights) == ("ReLU", "raw score, unbounded")
    # twelve slots of width 16 and a scale: the experts are left out
    assert router_line("soft_moe").parameters == 12 * 16 + 1
    assert [line.name for line in router_lines([f"{COSINE}:CosineRouter"])] == [*METHODS, f"{COSINE}:CosineRouter"]


def test_a_router_from_outside_gets_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--router", f"{COSINE}:CosineRouter", "--check", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    # four experts of hidden size 16, and a temperature
    assert row["parameters"] == 65
    assert row["decoder_safe"] and row["batch_invariant"] and row["generation_safe"]


def test_forms_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--markdown", "--columns", "name,causal"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| name | causal |" and "| expert_choice | no |" in table
    assert len(table) == 2 + len(METHODS)
    assert main(["--columns", "colour"]) == 2
    assert "expected some of name, paper" in capsys.readouterr().err
    assert main(["--router", "expert_choice"]) == 0
    assert "exactly T·c/E" in capsys.readouterr().out
