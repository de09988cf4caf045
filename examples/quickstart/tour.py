"""The main job on real text, from nothing to a Hugging Face model: run by examples/quickstart.sh."""

import argparse
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from comparison import compare_with_transformers
from corpus import gather, texts
from rich.console import Console
from rich.table import Table
from training import RECIPE, Job, expect, records, run_job
from vocabulary import check_round_trip, train_tokenizer
from yardsticks import measure, validation_loss

from megatron_moe.config.run import RunConfig
from megatron_moe.report.pictures import draw_expert_load, draw_loss_curve

ROOT = Path(__file__).resolve().parents[2]
PREEMPTED = 75
TP, PP, EP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size"
ETP, MICRO = "--expert-tensor-parallel-size", "--micro-batch-size"

# ranks -> layout before and after the interruption
LAYOUTS: dict[int, tuple[list[str], list[str]]] = {
    4: ([TP, "2", EP, "2"], [PP, "2", EP, "2", MICRO, "2"]),
    2: ([TP, "2", EP, "2", ETP, "1"], [PP, "2", MICRO, "2"]),
    1: ([], []),
}


@dataclass(frozen=True)
class Tour:
    """Where everything goes, and how much of it."""

    folder: Path
    steps: int
    num_ranks: int
    bf16: bool
    console: Console

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    @property
    def prefix(self) -> Path:
        return self.folder / "corpus_text_document"

    def flags(self) -> list[str]:
        """What both jobs are told beside the recipe and their layout."""
        paths = {"--data-path": self.prefix, "--tokenizer-model": self.tokenizer, "--save": self.folder / "checkpoint"}
        paths |= {"--log-dir": self.folder / "log", "--tensorboard-dir": self.folder / "tensorboard"}
        named = [word for flag, path in paths.items() for word in (flag, str(path))]
        lengths = ["--train-iters", str(self.steps), "--eval-interval", str(self.steps)]
        return [*named, *lengths, "--load", "latest", "--log-interval", "1", *(["--bf16"] if self.bf16 else [])]

    def config(self) -> RunConfig:
        return RunConfig.load(["--config", str(RECIPE), *self.flags()])

    @contextmanager
    def stage(self, title: str, *, spinner: bool = True) -> Iterator[Callable[[str], None]]:
        """One stage, one clear line: what it found and how long it took. Without a spinner: it shows a bar itself."""
        started, said = time.monotonic(), [""]
        with self.console.status(title) if spinner else nullcontext():
            yield lambda text: said.__setitem__(0, text)
        self.console.print(
            f"[{time.monotonic() - started:6.1f} s] {title}: {said[0]}", markup=False, highlight=False, soft_wrap=True
        )


def run_tool(name: str, *arguments: str) -> str:
    """A command of tools/; returns what it printed. Raises RuntimeError with its words when it fails."""
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{name} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def prepare(tour: Tour) -> None:
    """Corpus, tokenizer, token files."""
    with tour.stage("corpus") as say:
        documents, size = gather(tour.corpus)
        say(f"{documents} sources of Python's standard library, {size / 1e6:.1f} MB, in {tour.corpus}")
    found = texts(tour.corpus)
    with tour.stage("tokenizer") as say:
        train_tokenizer(found, tour.tokenizer.with_suffix(""), vocab_size=4096)
        ratio = check_round_trip(tour.tokenizer, found[:50])
        say(f"SentencePiece, 4096 pieces, {ratio:.2f} bytes a token, in {tour.tokenizer}")
    with tour.stage("preprocessing") as say:
        output = run_tool(
            "preprocess_data.py",
            *("--input", str(tour.corpus), "--output-prefix", str(tour.folder / "corpus")),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tour.tokenizer)),
            *("--append-eod", "--workers", "2", "--overwrite"),
        )
        say(f"{output.splitlines()[0]} in {tour.prefix}.bin and .idx")


def train(tour: Tour) -> None:
    """Train, be interrupted, go on in another layout."""
    before, after = LAYOUTS[tour.num_ranks]
    half = tour.steps // 2
    with tour.stage(f"training on {describe(before, tour)}, interrupted", spinner=False) as say:
        job = Job("train-1", tour.num_ranks, before, tour.flags(), tour.folder)
        expect(run_job(job, tour.steps, interrupt_at=half), PREEMPTED, job)
        stopped = records(tour.folder)[-1]
        first = records(tour.folder)[0]
        say(
            f"loss {first['loss']:.3f} -> {stopped['loss']:.3f}; SIGTERM after step {stopped['step']:.0f}, "
            f"checkpoint written, exit code {PREEMPTED}"
        )
    with tour.stage(f"training resumed on {describe(after, tour)}", spinner=False) as say:
        job = Job("train-2", tour.num_ranks, after, tour.flags(), tour.folder)
        expect(run_job(job, tour.steps), 0, job)
        lines = records(tour.folder)
        check_continuous(lines, stopped)
        say(
            f"went on with step {stopped['step'] + 1:.0f} (sample {stopped['consumed_samples']:.0f}), "
            f"loss {lines[-1]['loss']:.3f} at step {lines[-1]['step']:.0f}"
        )


def describe(layout: Sequence[str], tour: Tour) -> str:
    """A layout in words."""
    short = {TP: "TP", PP: "PP", EP: "EP", ETP: "ETP"}
    words = [f"{short[flag]} {size}" for flag, size in zip(layout[::2], layout[1::2], strict=True) if flag in short]
    return f"{tour.num_ranks} rank{'s' if tour.num_ranks > 1 else ''}" + (f" ({' x '.join(words)})" if words else "")


def check_continuous(lines: list[dict[str, float]], stopped: dict[str, float]) -> None:
    """Raises RuntimeError unless every step is there once, in order, with the samples that belong to it."""
    batch = stopped["consumed_samples"] / stopped["step"]
    for number, line in enumerate(lines, start=1):
        if line["step"] != number or line["consumed_samples"] != number * batch:
            raise RuntimeError(
                f"line {number} of the log is step {line['step']} after {line['consumed_samples']} samples"
            )


def judge(tour: Tour) -> None:
    """The model's validation figures beside those of simple models, and the pictures."""
    with tour.stage("validation") as say:
        found = measure(tour.config(), validation_loss(tour.folder))
        draw_loss_curve(
            tour.folder / "log" / "metrics.jsonl",
            tour.folder / "loss.png",
            {name: found.nats[name] for name in ("unigram", "bigram")},
        )
        draw_expert_load(tour.folder / "log" / "routing.jsonl", tour.folder / "expert_load.png")
        gain = found.nats["unigram"] - found.nats["this model"]
        say(f"{gain:.2f} nat per token below the unigram, over {found.num_tokens} tokens ({found.num_bytes} bytes)")
    table = Table("on the same validation text", "nats per token", "bits per byte")
    for name, bits in found.bits.items():
        table.add_row(name, f"{found.nats[name]:.3f}" if name in found.nats else "", f"{bits:.3f}")
    tour.console.print(table)
    (tour.folder / "validation.json").write_text(
        json.dumps({"nats": found.nats, "bits_per_byte": found.bits}, indent=1)
    )
    if gain < 0.5:
        raise RuntimeError(f"the model is only {gain:.2f} nat per token better than the unigram; 0.5 was expected")


def export(tour: Tour) -> None:
    """To Hugging Face's format, and the same logits there."""
    output = tour.folder / "hf"
    with tour.stage("export") as say:
        run_tool("convert_checkpoint.py", "export", "--load", str(tour.folder / "checkpoint"), "--output", str(output))
        compared = compare_with_transformers(tour.folder / "checkpoint", output, tour.config())
        say(
            f"{compared.family} in {output}; {compared.num_tokens} tokens, every expert hit, logits differ from "
            f"transformers' by {compared.relative_error:.1e} of their scale"
        )


def generate(tour: Tour) -> None:
    """A few lines of the model's own."""
    with tour.stage("generation") as say:
        text = run_tool(
            "generate.py",
            *("--load", str(tour.folder / "checkpoint"), "--prompt", "import os\n\ndef "),
            *("--max-new-tokens", "60", "--temperature", "0.8", "--top-k", "40", "--seed", "1"),
        )
        say("the trained model goes on from 'import os, def ...':")
    tour.console.print(text.strip(), markup=False, highlight=False, style="dim")


def finish(tour: Tour, started: float) -> None:
    """Where everything is."""
    folder = tour.folder
    table = Table("what", "where", title=f"the whole tour took {time.monotonic() - started:.0f} s")
    for what, where in {
        "log, figures of every step": folder / "log",
        "loss curve": folder / "loss.png",
        "expert load": folder / "expert_load.png",
        "TensorBoard": folder / "tensorboard",
        "checkpoint": folder / "checkpoint",
        "Hugging Face export": folder / "hf",
    }.items():
        table.add_row(what, str(where))
    tour.console.print(table)


def ranks_for(gpus: int) -> int:
    """Four ranks on the CPU; on GPUs as many of 1, 2 and 4 as there are cards."""
    return 4 if gpus == 0 else max(ranks for ranks in LAYOUTS if ranks <= gpus)


def main(argv: Sequence[str]) -> int:
    """Run all stages; returns the exit code."""
    parser = argparse.ArgumentParser(prog="examples/quickstart.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="train ten times longer")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", metavar="DIR")
    arguments = parser.parse_args(argv)
    gpus = torch.cuda.device_count()
    steps = tomllib.loads(RECIPE.read_text())["training"]["train_iters"]
    tour = Tour(
        folder=arguments.output,
        steps=steps * (10 if arguments.full else 1),
        num_ranks=ranks_for(gpus),
        bf16=gpus > 0,
        console=Console(),
    )
    if tour.folder.exists() and any(tour.folder.iterdir()):
        kept = tour.folder.with_name(f"{tour.folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        tour.folder.rename(kept)
        tour.console.print(f"an earlier tour was moved to {kept}", markup=False)
    tour.folder.mkdir(parents=True)
    started = time.monotonic()
    try:
        for work in (prepare, train, judge, export, generate):
            work(tour)
    except (RuntimeError, ValueError, OSError) as error:
        tour.console.print(f"quickstart: {error}", markup=False, style="red")
        return 1
    finish(tour, started)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
