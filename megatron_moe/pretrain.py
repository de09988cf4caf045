"""Train: read the run, join the ranks, go.    torchrun --nproc-per-node 4 -m megatron_moe.pretrain --config run.toml"""

import gc
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch

from megatron_moe.config.errors import ConfigError, MegatronMoEError, PeerError
from megatron_moe.config.fallback import fit_world
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.launch import Place, find_place, first_host, join, leave, on_one_machine, pick_device
from megatron_moe.parallel.peers import as_peer_error
from megatron_moe.parallel.state import ParallelState
from megatron_moe.parallel.summary import note_for_torchrun
from megatron_moe.training.console import setup_logging
from megatron_moe.training.engine import grid_of
from megatron_moe.training.signals import StopSignals
from megatron_moe.training.together import together
from megatron_moe.training.trainer import Trainer
from megatron_moe.training.validate import validate
from megatron_moe.training.watch.rank import Watch, watched

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # as shells say it of Ctrl-C


def main(argv: Sequence[str]) -> int:
    """Runs one rank; returns its exit code (0 finished, 75 preempted, and those of config/errors.py)."""
    try:
        place = find_place(os.environ)
        config = fit_world(RunConfig.load(argv), place.world_size)
        notes = validate(config)
    except MegatronMoEError as error:
        # the ranks have not met: each machine may see something else
        return _tell(error, speaks=os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0")
    # the watcher is forked here: before anything touches a GPU or another rank
    with watched(config, place, alone=on_one_machine(place, os.environ)) as watch:
        return watch.ended(_run(config, place, notes, watch))


def _run(config: RunConfig, place: Place, notes: Sequence[str], watch: Watch) -> int:
    """From the first look at the device to the exit code."""
    try:
        device = pick_device(place)
    except ConfigError as error:
        return _tell(error, speaks=True)
    try:
        return _train(config, place, device, notes, watch)
    except PeerError as error:
        return _tell(error, speaks=True)
    except MegatronMoEError as error:
        return _tell(error, speaks=place.rank == 0)
    except RuntimeError as error:
        lost = as_peer_error(error, place.rank, watch.cause)
        if lost is None:
            raise
        return _tell(lost, speaks=True)
    except KeyboardInterrupt:
        print(f"megatron_moe: rank {place.rank} was interrupted; what was saved is kept.", file=sys.stderr, flush=True)
        return INTERRUPTED
    finally:
        leave()


def _train(config: RunConfig, place: Place, device: torch.device, notes: Sequence[str], watch: Watch) -> int:
    parallel = config.parallel
    # what the imports made stays to the end: no collection need look at it again, 0.2 s each time
    gc.freeze()
    if place.world_size == 1:
        state = ParallelState.alone()
    else:
        join(place, device, parallel.distributed_backend, parallel.distributed_timeout_minutes, os.environ)
        checks = timedelta(minutes=parallel.distributed_timeout_minutes) if parallel.debug_collectives else None
        state = ParallelState.distributed(grid_of(config, place.world_size), checks=checks)
        state = watch.meet(state, device, first_host(os.environ))
    log_dir = Path(config.logging.log_dir) if config.logging.log_dir else None
    with together(state.world, device):
        setup_logging(place.rank, log_dir)
        if place.rank == 0:
            logger.info("configuration (value, and who set it):\n%s", config.explain())
            for note in notes:
                logger.warning(note)
    # from here on the ranks can agree to stop; before, a signal ends them at once
    with StopSignals.of(config.training) as signals:
        return Trainer(config, state, device, watch).run(signals)


def _tell(error: MegatronMoEError, speaks: bool) -> int:
    """One paragraph on stderr, from a rank that speaks for those that found the same; torchrun hears it from each."""
    note_for_torchrun(str(error), os.environ)
    if speaks:
        print(f"megatron_moe: {error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
