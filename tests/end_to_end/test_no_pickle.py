"""Training, resuming, converting both ways and generating with every way to load a pickle booby-trapped."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goals import Trials

from tests.end_to_end.commands import call, whole_checkpoint, write_recipe
from tests.end_to_end.tiny_job import job, write_corpus
from tools import convert_checkpoint, generate, inspect_dataset

# a Mixtral
MIXTRAL: dict[str, dict[str, Any]] = {
    "model": {"untie_embeddings_and_output_weights": True},
    "moe": {"layer_freq": "1", "router_type": "top_k", "router_topk": 2, "z_loss_coeff": 0.0},
}


@pytest.fixture
def traps(monkeypatch: pytest.MonkeyPatch) -> None:
    def trap(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a pickle was opened")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, trap)
    monkeypatch.setattr(torch.serialization, "load", trap)
    numpy_load = np.load

    def safe_load(*arguments: Any, **options: Any) -> Any:
        assert not options.get("allow_pickle"), "a pickle was allowed"
        return numpy_load(*arguments, **options)

    monkeypatch.setattr(np, "load", safe_load)


@pytest.mark.usefixtures("traps")
@pytest.mark.goal("R35", ci=1, nightly=1, what="train, resume, export, import, generate, inspect: no pickle is opened")
def test_no_command_opens_a_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trials: Trials
) -> None:
    with pytest.raises(AssertionError, match="a pickle was opened"):
        pickle.loads(b"N.")
    config = job(write_corpus(tmp_path / "tokens"), **MIXTRAL)
    recipe = write_recipe(tmp_path, config)
    saved, folder, imported = tmp_path / "saved", tmp_path / "folder", tmp_path / "imported"
    running = ("--config", str(recipe), "--save", str(saved), "--load", "latest", "--num-workers", "1")
    assert call(*running, "--exit-interval", "2") == 0
    assert call(*running, "--exit-interval", "4") == 0
    assert whole_checkpoint(saved).step == 4
    assert inspect_dataset.main([str(tmp_path / "tokens"), "--verify"]) == 0
    export = ["export", "--load", str(saved), "--output", str(folder), "--model-type", "mixtral"]
    assert convert_checkpoint.main(export) == 0, capsys.readouterr().err
    assert convert_checkpoint.main(["import", "--hf-folder", str(folder), "--save", str(imported)]) == 0
    assert generate.main(["--load", str(saved), "--prompt", "1 2 3", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out
    trials.add(1)
