"""The loop: read, step, log, evaluate, save; stop when asked, and go on where it stopped."""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.checkpoint.names import folded
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import ConfigError, DataError, NonFiniteError, ReplicaError, SpikeError, StorageError
from megatron_moe.config.optional import require
from megatron_moe.config.run import RunConfig
from megatron_moe.config.whole_file import write_whole
from megatron_moe.data.batch import Batch
from megatron_moe.data.build import build_datasets, vocabulary_size
from megatron_moe.data.gpt_dataset import Dataset
from megatron_moe.data.loader import Loader
from megatron_moe.data.sampler import Sampler
from megatron_moe.data.tokenizer import build_tokenizer
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.console import Pace, StepRecord, log_line
from megatron_moe.training.engine import Engine, StepResult
from megatron_moe.training.flops import flops_per_token, formula_text, peak_flops
from megatron_moe.training.gpu_monitor import GpuMonitor
from megatron_moe.training.metrics import summarise_routing
from megatron_moe.training.restarts import Restarts
from megatron_moe.training.resume import check_place_to_save, check_same_data, check_same_run, go_on
from megatron_moe.training.rewind import fill_back, way_back
from megatron_moe.training.signals import StopSignals
from megatron_moe.training.sinks import Sinks
from megatron_moe.training.skipped import Skipped
from megatron_moe.training.spikes import SpikeWatch
from megatron_moe.training.together import together
from megatron_moe.training.watch.rank import Watch

logger = logging.getLogger(__name__)

FINISHED = 0
PREEMPTED = 75  # asked to stop: by a signal or the kill switch; checkpoint written


class Trainer:
    """One run on this rank. Collective: all ranks build and run together."""

    def __init__(
        self, config: RunConfig, state: ParallelState, device: torch.device, watch: Watch | None = None
    ) -> None:
        self.config = config
        self.state = state
        self.device = device
        self.watch = watch or Watch()
        self._restarts = Restarts(config.checkpoint, state.world)
        self._restarts.refuse(state.world, device)
        with together(state.world, device):
            self.tokenizer = build_tokenizer(config.data, config.model.vocab_size)
            self.vocab_size = vocabulary_size(config, self.tokenizer)
            self.datasets = build_datasets(config, self.tokenizer)
            self._fingerprints = self._fingerprint_inputs()
            self._check_early()
        self.engine = Engine(config, state, device, self.vocab_size)
        self.skipped = Skipped(config.training)
        self.spikes = SpikeWatch(config.training.spike_sigma, config.training.spike_window)
        self.engine.judge = self.spikes.judge
        self.step = 0  # finished
        self.first_step = 0  # finished before this process
        self._last_good: str | None = None  # checkpoint, for messages
        self.writer = self._writer()
        self._flops = flops_per_token(config, self.vocab_size)
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._gpu = GpuMonitor.for_device(device)
        self.loader = Loader(
            self._dataset("train"),
            self._sampler(config.training.left_out),
            device="cpu",
            num_workers=config.data.num_workers,
        )

    def _dataset(self, split: str) -> Dataset:
        found = self.datasets[split]
        if found is None:
            raise ConfigError(f"--split {self.config.data.split} leaves no sample for {split}; give it a larger share.")
        return found

    def _fingerprint_inputs(self) -> dict[str, str]:
        """What a checkpoint keeps to know tokenizer and corpus again."""
        train = self._dataset("train")
        found = {"tokenizer": self.tokenizer.fingerprint(), "training corpus": train.fingerprint()}
        tokens = train.tokens_fingerprint()
        return found if tokens is None else found | {"training text": tokens}

    def _check_early(self) -> None:
        """What would otherwise stop the run in the middle, or on the first rank alone."""
        if self.config.training.eval_interval is not None:
            self._dataset("valid")
        if self.config.logging.tensorboard_dir is not None:
            require("tensorboard", extra="log")

    def _sampler(self, left_out: Sequence[range] = ()) -> Sampler:
        training = self.config.training
        return Sampler(
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            dp_rank=self.state.dp.rank,
            dp_size=self.state.dp.size,
            left_out=left_out,
        )

    def _writer(self) -> CheckpointWriter | None:
        wanted = self.config.checkpoint
        if wanted.save is None:
            return None
        return CheckpointWriter(
            Path(wanted.save),
            self.state.world,
            keep=wanted.keep,
            run_id=run_id(self.config),
            background=wanted.async_save,
            sha256=wanted.save_sha256,
            device=self.device,
        )

    def run(self, watched: StopSignals | None = None) -> int:
        """Train to the end, or until asked to stop; returns the exit code.

        watched: signals that are looked out for already.
        """
        with nullcontext(watched) if watched else StopSignals.of(self.config.training) as signals:
            self.watch.enter("loading")
            self.restore()
            self.first_step = self.step
            if self.step < self.config.training.num_steps and signals.agreed(self.state.world, self.device):
                said = "stopped by %s before the first step; nothing was trained, nothing written, exit code %d"
                logger.warning(said, signals.reason, PREEMPTED)
                return PREEMPTED
            logger.info(formula_text())
            with self._sinks() as sinks, self.loader:
                self._restarts.begin(self.step)
                if self.writer is not None and self.config.checkpoint.async_save:
                    self.writer.prepare(self._blocks())
                try:
                    self._loop(sinks, signals)
                except (NonFiniteError, SpikeError, ReplicaError, DataError, StorageError):
                    # all ranks are here: what was being saved is still good, or is refused
                    self._finish_saving()
                    raise
            self._finish_saving()
        if self.writer is not None and self.writer.last_error is not None:
            raise self.writer.last_error
        self._restarts.forget()
        if self.step < self.config.training.num_steps and signals.stopped:
            written = "the checkpoint is written" if self.writer else "without --save, no checkpoint is written"
            said = "stopped by %s after step %d; %s, exit code %d"
            logger.warning(said, signals.reason, self.step, written, PREEMPTED)
            return PREEMPTED
        return FINISHED

    def _loop(self, sinks: Sinks, signals: StopSignals) -> None:
        num_steps = self.config.training.num_steps
        started = time.monotonic()
        pace = Pace()
        while self.step < num_steps:
            before = self.step
            self.watch.begins(before)
            result = self.train_step()
            self.watch.finished(self.step)
            if self.step < before:
                sinks.go_back(self.step)
                pace.restart()
                continue
            if result is not None:
                pace.step()
                self._log(result, pace, sinks)
            self._validate(sinks)
            stop = signals.agreed(self.state.world, self.device)
            last = self.step == num_steps or self._planned_exit(started) or stop
            self._save(last)
            if last:
                break

    def _finish_saving(self) -> None:
        self.watch.enter("ending")
        if self.writer is not None:
            self.writer.finish()
            self._restarts.progressed(self.writer.last_step)

    def train_step(self) -> StepResult | None:
        """The next step of the run; None when it was skipped, or the run went back instead."""
        self.watch.enter("data")
        samples = self.loader.sampler.next_step
        batches = self._next(self.loader)
        self.watch.enter("step")
        try:
            result: StepResult | None = self.engine.train_step(self.step, batches, self._last_good)
            self.skipped.made()
        except (NonFiniteError, SpikeError) as error:
            if isinstance(error, SpikeError) and self._go_back(error):
                return None
            self.skipped.skip(error, self.step + 1, samples)
            result = None
        self.step += 1
        return result

    def _go_back(self, error: SpikeError) -> bool:
        """After a spike, if wanted and there is a checkpoint: on from there, behind the samples of the spike."""
        training, world, wanted = self.config.training, self.state.world, self.config.checkpoint
        if training.spike_action != "rewind" or self.writer is None or wanted.save is None:
            return False
        self._finish_saving()
        self.watch.enter("loading")
        root, spike, behind = Path(wanted.save), self.step + 1, self.loader.sampler.consumed
        target = way_back(root, spike, training.spike_rewind_steps, world, self.device)
        if target is None:
            return False
        fill_back(root, target, world, self.device, self._take_up)
        left_out = range(self.loader.sampler.consumed, behind)
        self.skipped.go_back(error, spike, left_out, self.step)
        self.writer.go_back(self.step)
        self.loader.load_state_dict({"consumed_samples": behind})
        return True

    def _next(self, loader: Loader) -> list[Batch]:
        with together(self.state.world, self.device):
            batches = next(loader)
        return batches

    def _sinks(self) -> Sinks:
        wanted = self.config.logging
        # the last rank of the pipeline could as well: every rank knows all figures
        speaks = self.state.rank == 0
        log_dir = Path(wanted.log_dir) if wanted.log_dir and speaks else None
        with together(self.state.world, self.device):
            if log_dir is not None:
                # not before all is known to fit: a mistaken command leaves that of the run before
                log_dir.mkdir(parents=True, exist_ok=True)
                write_whole(log_dir / "config.json", self.config.to_json())
        return Sinks(log_dir, Path(wanted.tensorboard_dir) if wanted.tensorboard_dir and speaks else None, self.step)

    def _log(self, result: StepResult, pace: Pace, sinks: Sinks) -> None:
        first = self.step == self.first_step + 1
        if self.step % self.config.logging.log_interval and not first:
            return
        training = self.config.training
        record = StepRecord(
            step=self.step,
            total_steps=training.num_steps,
            consumed_samples=self.loader.state_dict()["consumed_samples"],
            global_batch_size=training.global_batch_size,
            seconds=pace.seconds_per_step(),
            tokens=training.global_batch_size * self.config.data.tokens_of_a_sample,
            world_size=self.state.world.size,
            flops=self._flops * training.global_batch_size * self.config.data.tokens_of_a_sample,
            peak_flops=self._peak,
            loss=result.metrics.loss,
            aux_losses=result.metrics.aux_losses,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            routing=summarise_routing(result.metrics.layers),
            gpu=self._gpu.read() if self._gpu is not None else None,
        )
        logger.info(log_line(record))
        sinks.write(record, result.metrics.layers)
        pace.restart()

    def _validate(self, sinks: Sinks) -> None:
        interval = self.config.training.eval_interval
        if interval is None or (self.step % interval and self.step != self.config.training.num_steps):
            return
        self.watch.enter("evaluation")
        loss = self.validation_loss()
        logger.info("validation loss at iteration %d | lm loss value: %.6E", self.step, loss)
        sinks.write_validation(self.step, loss, {})

    def validation_loss(self) -> float:
        """Mean loss per token over the first eval_iters global batches of the validation split, in nats."""
        sampler = self._sampler()
        total = tokens = 0.0
        with Loader(self._dataset("valid"), sampler) as loader:
            for _ in range(self.config.training.eval_iters):
                batches = self._next(loader)
                metrics, count = self.engine.evaluate(batches)
                total += metrics.loss * count
                tokens += count
        return total / max(1.0, tokens)

    def _planned_exit(self, started: float) -> bool:
        training = self.config.training
        at_interval = training.exit_interval is not None and self.step % training.exit_interval == 0
        limit = training.exit_duration_in_mins
        if limit is None:
            return at_interval
        # clocks differ: all ranks follow the slowest
        late = torch.tensor([float(time.monotonic() - started > limit * 60.0)], device=self.device)
        return at_interval or bool(self.state.world.comm.all_reduce_(late, "max").item())

    def _save(self, last: bool) -> None:
        if self.writer is None:
            return
        interval = self.config.checkpoint.save_interval
        self.watch.enter("saving")
        self.writer.commit_if_ready()
        if last or (interval is not None and self.step % interval == 0):
            self.writer.save(
                self.step,
                self._blocks(),
                self._state(),
                self.config.to_json(),
                self._fingerprints,
            )
            if self.writer.last_error is None:
                self._last_good = f"step {self.step} in {self.config.checkpoint.save}"
        self._restarts.progressed(self.writer.last_step)

    def _blocks(self) -> dict[str, list[Block]]:
        return {"model": self.engine.weight_blocks(), "optim": self.engine.optimizer.blocks()}

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "optimizer": self.engine.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "seed": self.config.training.seed,
            "skipped": self.skipped.state_dict(),
            "spikes": self.spikes.state_dict(),
            "vocab_size": self.vocab_size,
        }

    def restore(self) -> None:
        """Go on from the newest valid checkpoint, if one was asked for and is there."""
        go_on(self.config.checkpoint, self.state.world, self.device, self._fill)
        with together(self.state.world, self.device):
            check_place_to_save(self.config.checkpoint, self.step)

    def _fill(self, reader: CheckpointReader) -> None:
        wanted = self.config.checkpoint
        if not wanted.finetune:
            with together(self.state.world, self.device):
                changed = check_same_run(reader, self.config)
                check_same_data(reader, self._fingerprints)
            if changed:
                logger.info("not as in %s, and taken as given now: %s", reader.folder, "; ".join(changed))

        def fill(blocks: list[Block]) -> None:
            spare = reader.fill_all(blocks, cast=wanted.finetune, unused="name" if wanted.finetune else "refuse")
            if spare:
                logger.warning("not read from %s: %s", reader.folder, ", ".join(folded(spare)))

        self.engine.fill_weights(fill)
        if wanted.finetune:
            logger.info("weights of step %d read from %s; starting at step 0", reader.step, wanted.load_directory)
            return
        if not wanted.no_load_optim:
            self._fill_optimizer(reader)
        self.skipped.load_state_dict(reader.state.get("skipped", {}))
        self._go_on_after(reader)
        consumed = reader.state["loader"]["consumed_samples"]
        logger.info("resuming after step %d (%d samples) from %s", self.step, consumed, wanted.load_directory)

    def _take_up(self, reader: CheckpointReader) -> None:
        """All of a checkpoint of this run, but for which steps were skipped: that is history."""
        self.engine.fill_weights(reader.fill_all)
        self._fill_optimizer(reader)
        self._go_on_after(reader)

    def _fill_optimizer(self, reader: CheckpointReader) -> None:
        reader.fill_all(self.engine.optimizer.blocks(), "optim")
        self.engine.optimizer.load_state_dict(reader.state["optimizer"])

    def _go_on_after(self, reader: CheckpointReader) -> None:
        self.step = int(reader.state["step"])
        self.loader.load_state_dict(reader.state["loader"])
        self.spikes.load_state_dict(reader.state.get("spikes", {}))
        self._last_good = f"step {reader.step} in {reader.folder.parent}"


def run_id(config: RunConfig) -> str:
    """A name for the run, the same on all ranks: what is trained, on what, from which seed."""
    text = json.dumps({name: config.to_dict()[name] for name in ("model", "moe", "data", "training")}, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())
