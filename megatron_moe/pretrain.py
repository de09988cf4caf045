"""Train: read the run, join the ranks, go.

    python -m megatron_moe.launch --nproc-per-node 4 -m megatron_moe.pretrain --config recipe.toml
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.errors import MegatronMoEError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.world import check_world
from megatron_moe.parallel.launch import Place, find_place, join, leave, pick_device
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.console import setup_logging
from megatron_moe.training.engine import grid_of
from megatron_moe.training.trainer import Trainer
from megatron_moe.training.validate import validate

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Runs one rank; returns its exit code (0 finished, 75 preempted, and those of config/errors.py)."""
    place = find_place(os.environ)
    try:
        config = RunConfig.load(argv)
        check_world(config, place.world_size)
        notes = validate(config)
    except MegatronMoEError as error:
        return _tell(error, place)
    log_dir = Path(config.logging.log_dir) if config.logging.log_dir else None
    setup_logging(place.rank, log_dir)
    if place.rank == 0:
        _describe(config, log_dir)
    for note in notes:
        logger.warning(note)
    try:
        return _train(config, place)
    except MegatronMoEError as error:
        return _tell(error, place)
    finally:
        leave()


def _train(config: RunConfig, place: Place) -> int:
    device = pick_device(place)
    parallel = config.parallel
    if place.world_size == 1:
        state = ParallelState.alone()
    else:
        join(place, device, parallel.distributed_backend, parallel.distributed_timeout_minutes, os.environ)
        state = ParallelState.distributed(grid_of(config, place.world_size))
    return Trainer(config, state, device).run()


def _describe(config: RunConfig, log_dir: Path | None) -> None:
    """The resolved configuration, on the console and beside the log."""
    logger.info("configuration (value, and who set it):\n%s", config.explain())
    if log_dir is not None:
        (log_dir / "config.json").write_text(config.to_json())


def _tell(error: MegatronMoEError, place: Place) -> int:
    """One paragraph, from one rank: the others found the same."""
    if place.rank == 0:
        print(f"megatron_moe: {error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
