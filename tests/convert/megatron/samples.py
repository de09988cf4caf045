"""Golden Megatron checkpoints to be spoilt, and a conversion without a child process, which takes seconds to start."""

from __future__ import annotations

import argparse
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_tensors

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.config.errors import CheckpointError
from megatron_moe.config.run import RunConfig
from megatron_moe.convert.megatron import child
from megatron_moe.convert.megatron.folder import iteration_at
from megatron_moe.convert.megatron.import_ import MegatronOptions
from megatron_moe.convert.megatron.inert import plain
from megatron_moe.convert.megatron.opener import write_plain
from megatron_moe.convert.megatron.restricted import Refused, load_file
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.whole import whole_logits
from megatron_moe.parallel.blocks import module_blocks
from megatron_moe.parallel.state import ParallelState

GOLDEN = Path(__file__).parents[2] / "golden" / "megatron"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and "-" in path.name)
ALLOWED = MegatronOptions(pickles_allowed=True)
STEP_FOLDER = "iter_0000007"
RANK_FILE = "model_optim_rng.pt"
STATE = ParallelState.alone()
# both sides compute in float32, in another order
TOLERANCE = 1e-5


def open_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loaders in this process; what they refuse is told as by the child."""

    def run(folder: Path, output: Path) -> None:
        try:
            write_plain(iteration_at(folder), output, "none, in a test")
        except Refused as error:
            raise CheckpointError(f"refused: {error}") from error

    monkeypatch.setattr(child, "_run", run)


def copy_of(case: str, place: Path) -> Path:
    """The step's folder of a golden checkpoint, which a test may spoil."""
    shutil.copytree(GOLDEN / case, place / case)
    return place / case / STEP_FOLDER


def change_ranks(folder: Path, change: Callable[[str, dict[str, Any]], None]) -> None:
    """Apply `change(name of the rank's folder, state)` to every file of the format torch."""
    for path in sorted(folder.glob(f"mp_rank_*/{RANK_FILE}")):
        # without megatron-core, whose classes the settings name
        state = load_file(path)
        state["args"] = argparse.Namespace(**plain(state["args"].fields()))
        kept = {name: value for name, value in state["model"].items() if isinstance(value, torch.Tensor)}
        state["model"] = {name: value.clone() for name, value in kept.items()}
        change(path.parent.name, state)
        torch.save(state, path)


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Apply `change` to the Metadata of torch.distributed.checkpoint."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def weights_of(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a converted checkpoint."""
    reader = find_checkpoint(root, None, STATE.world)
    return {name: reader.logical(name) for name in reader.names("model")}


def check_logits(root: Path, run: RunConfig, model: str) -> None:
    """Our model with these weights gives the logits that megatron-core gave."""
    expected = load_tensors(GOLDEN / f"{model}.safetensors")
    rows = expected["logits"].shape[-1]
    assert run.model.vocab_size == rows == 48
    (stage,) = stages = build_stages(gpt_spec(run, rows), STATE)
    initialise_stages(stages, STATE, 5, torch.device("cpu"))
    find_checkpoint(root, None, STATE.world).fill(module_blocks([stage], STATE))
    logits = whole_logits(stage.eval(), expected["tokens"])[0]
    theirs = expected["logits"]
    assert float(theirs.std()) > 0.1
    assert float((logits - theirs).abs().max()) < TOLERANCE * float(theirs.abs().max())


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return Path.write_text, (self.sentinel, "opened")


def saved(value: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
