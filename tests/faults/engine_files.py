"""An engine's checkpoints without the Trainer around it: what tests of many layouts and routers save and load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.run import RunConfig
from megatron_moe.training.engine import Engine
from tests.checkpoint.samples import HastyStorage


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The same run, so long."""
    fields = config.to_dict()
    fields["training"]["train_iters"] = steps
    return RunConfig.from_json(json.dumps(fields))


def save_engine(engine: Engine, folder: Path, step: int, state: Mapping[str, Any] | None = None) -> None:
    """Weights and optimizer of all ranks, as step_XXXXXXXX. Collective.   state: what else is to be carried on."""
    writer = CheckpointWriter(folder, engine.state.world, None, "run", HastyStorage(), background=False)
    parts = {"model": engine.weight_blocks(), "optim": engine.optimizer.blocks()}
    writer.save(step, parts, {"optimizer": engine.optimizer.state_dict(), **(state or {})}, engine.config.to_json(), {})
    assert writer.last_error is None
