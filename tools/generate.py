"""Text out of a checkpoint: goes on from prompts, token by token, on any layout.

Examples:
    python tools/generate.py --load runs/quickstart/checkpoint --prompt "import os" --max-new-tokens 60 --top-k 40
    python tools/generate.py --load ckpt --ckpt-step 12000 --greedy < prompts.txt
    torchrun --nproc-per-node 4 tools/generate.py --load ckpt --prompt-file prompts.txt \\
        --tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1

Without --prompt and --prompt-file, prompts are read from the terminal, one a line, until its end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.checkpoint.messages import told_by_first
from megatron_moe.config.errors import ConfigError, DataError, MegatronMoEError
from megatron_moe.config.options import settings_of
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data.build import start_id, vocabulary_size
from megatron_moe.data.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from megatron_moe.inference.generate import Generator, refuse_context_parallelism
from megatron_moe.inference.limits import decoding_notes, lift_capacity
from megatron_moe.inference.sampling import Sampling
from megatron_moe.inference.sentinels import Sentinels
from megatron_moe.models.build import DTYPES
from megatron_moe.models.load import LoadedModel, load_model
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.launch import Place, find_place, join, leave, pick_device
from megatron_moe.parallel.state import ParallelState

logger = logging.getLogger(__name__)

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "expert_model_parallel_ranks_per_node",
)
TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
# a person may think longer than a collective may take
PATIENT_TIMEOUT_MINUTES = 24 * 60.0


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="checkpoint directory (step_ folders)")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="default: the newest valid checkpoint")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as trained")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="'' begins a document")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line; empty lines are left out")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt: prompt, text, token_ids")
    choice = parser.add_argument_group("choosing tokens")
    choice.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    choice.add_argument("--greedy", action="store_true", help="always the likeliest token")
    choice.add_argument("--temperature", type=float, default=1.0, metavar="T", help="divides the logits; default 1")
    choice.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    choice.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that reach probability P")
    choice.add_argument("--seed", type=int, default=1234, metavar="N", help="same seed, same text; default 1234")
    choice.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time; default 16")
    choice.add_argument("--dropless", action="store_true", help="lift the experts' capacity")
    layout = parser.add_argument_group("layout", "any, whatever the checkpoint was trained on; other ranks repeat")
    _add_settings(layout, ParallelConfig, (*LAYOUT, "distributed_backend"))
    tokenizer = parser.add_argument_group("tokenizer", "default: that of the run")
    tokenizer.add_argument("--tokenizer-type", choices=list(TOKENIZER_TYPES))
    for name in TOKENIZER[1:]:
        tokenizer.add_argument(f"--{name.replace('_', '-')}", metavar="PATH", help="where it is now, if it has moved")
    return parser


def _add_settings(group: argparse._ArgumentGroup, section: type, names: Sequence[str]) -> None:
    """Options of a run's section, as they are spelt and explained there."""
    for name in names:
        setting = settings_of(section)[name]
        choices = setting.option.choices or None
        metavar = None if choices else "N"
        text = setting.option.help
        group.add_argument(
            setting.flag, type=setting.kind, default=setting.default, choices=choices, metavar=metavar, help=text
        )


def told(work: Callable[[], Any], state: ParallelState, device: torch.device) -> Any:
    """What `work` gives on the first rank (anything JSON holds), on all ranks; its error is raised on all."""
    message: dict[str, Any] = {}
    if state.world.is_first:
        try:
            message = {"answer": work()}
        except (ConfigError, DataError) as error:
            message = {type(error).__name__: str(error)}
    message = json.loads(told_by_first(json.dumps(message), state.world, device))
    for kind in (ConfigError, DataError):
        if kind.__name__ in message:
            raise kind(message[kind.__name__])
    return message["answer"]


@dataclass(frozen=True)
class Session:
    """A model that is ready, and what it speaks; the tokenizer is on the first rank only."""

    arguments: argparse.Namespace
    model: LoadedModel
    generator: Generator
    sampling: Sampling
    tokenizer: Tokenizer | None
    eod_id: int | None
    sentinels: Sentinels | None  # of a model that fills gaps, on the first rank

    def told(self, work: Callable[[], Any]) -> Any:
        return told(work, self.model.state, self.model.device)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """First rank only. A prompt without text begins a document."""
        assert self.tokenizer is not None
        if self.sentinels is not None:
            return [self.sentinels.encode(text) for text in texts]
        start = [] if self.eod_id is None else [self.eod_id]
        return [self.tokenizer.encode(text) or start for text in texts]

    def answer(self, texts: Sequence[str], first_sample: int) -> None:
        """Goes on from the texts, which only the first rank needs to know, and prints there. Collective."""
        prompts: list[list[int]] = self.told(lambda: self.encode(texts))
        given = self.arguments
        length = max(map(len, prompts), default=0) + given.max_new_tokens
        config = self.model.config
        longest = config.model.max_position_embeddings or config.data.seq_length
        if length > longest and self.model.state.world.is_first:
            logger.warning("note: %d tokens may come together, but the model was trained for %d", length, longest)
        answers = self.generator.generate(
            prompts,
            given.max_new_tokens,
            self.sampling,
            eod_id=self.eod_id,
            seed=given.seed,
            first_sample=first_sample,
        )
        if self.tokenizer is not None:
            for place, (text, prompt, answer) in enumerate(zip(texts, prompts, answers, strict=True)):
                self._show(place, text, prompt, answer)

    def _show(self, place: int, text: str, prompt: list[int], answer: list[int]) -> None:
        assert self.tokenizer is not None
        if self.sentinels is None:
            whole = self.tokenizer.decode([*(prompt if text else []), *answer])
        else:
            whole = self.sentinels.decode(answer)
        if self.arguments.json:
            print(json.dumps({"prompt": text, "text": whole, "token_ids": answer}, ensure_ascii=False), flush=True)
            return
        if place:
            print("-" * 40)
        print(whole, flush=True)


def prompts_of_file(path: Path) -> list[str]:
    """The lines that hold something; DataError when there are none."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {path} cannot be read ({error}); give a text file in UTF-8.") from error
    if not lines:
        raise DataError(f"--prompt-file {path} holds no prompt; write one a line.")
    return lines


def next_line() -> str | None:
    """A prompt from the terminal or a pipe; None at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        for line in sys.stdin:
            if line.strip():
                return line.rstrip("\n")
    except KeyboardInterrupt:
        pass
    return None


def typed_lines(session: Session) -> Iterator[str]:
    """Line after line, on all ranks."""
    while True:
        line: str | None = session.told(next_line)
        if line is None:
            return
        yield line


def layout_asked(arguments: argparse.Namespace) -> ParallelConfig:
    """What the flags say of the layout."""
    return ParallelConfig(**{name: getattr(arguments, name) for name in LAYOUT})


def make_tokenizer(arguments: argparse.Namespace, config: RunConfig, fingerprint: str | None) -> Tokenizer:
    """The run's, at the place that was named. fingerprint: that of the tokenizer that the run was trained with."""
    moved = {name: value for name in TOKENIZER if (value := getattr(arguments, name)) is not None}
    tokenizer = build_tokenizer(replace(config.data, **moved), config.model.vocab_size)
    if fingerprint not in (None, tokenizer.fingerprint()):
        logger.warning("note: the run was trained with another tokenizer than this one; its ids may mean other words")
    return tokenizer


def open_session(arguments: argparse.Namespace, state: ParallelState, device: torch.device) -> Session:
    """Everything that can be refused is refused before the weights are read."""
    given = arguments
    sampling = Sampling(greedy=given.greedy, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p)
    # the bytes are verified when the weights are read
    reader = find_checkpoint(given.load, given.ckpt_step, state.world, check="sizes", device=device)
    saved = RunConfig.from_json(reader.config_json, source=f"config.json of {reader.folder}")
    config = replace(saved, parallel=layout_asked(given))  # refuses a layout that does not fit the model
    tokenizers: list[Tokenizer] = []

    def describe() -> dict[str, int | None]:
        tokenizer = make_tokenizer(given, config, reader.data.get("tokenizer"))
        tokenizers.append(tokenizer)
        spans = config.model.encoder_num_layers > 0
        return {
            "vocab_size": vocabulary_size(config, tokenizer) if spans else tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "start_id": start_id(tokenizer) if spans else None,
        }

    words = told(describe, state, device)
    dtype = DTYPES[given.dtype] if given.dtype else None
    model = load_model(given.load, step=given.ckpt_step, state=state, device=device, dtype=dtype)
    if given.dropless:
        lift_capacity(model.stages, state)
    elif state.world.is_first:
        for note in decoding_notes(model.spec):
            logger.warning("note: %s", note)
    # an id that the tokenizer does not know has no text
    spec = replace(model.spec, vocab_size=min(model.spec.vocab_size, words["vocab_size"]))
    generator = Generator(model.stages, state, spec, device, max_batch=given.batch_size, start_id=words["start_id"])
    tokenizer = tokenizers[0] if tokenizers else None
    fills_gaps = tokenizer is not None and words["start_id"] is not None
    sentinels = Sentinels(tokenizer, config.data.vocab_extra_ids) if tokenizer is not None and fills_gaps else None
    return Session(given, model, generator, sampling, tokenizer, words["eod_id"], sentinels)


def join_ranks(arguments: argparse.Namespace, place: Place, device: torch.device, *, patient: bool) -> ParallelState:
    """This rank's state on the layout that was asked for. patient: ranks may wait for a person."""
    parallel = layout_asked(arguments)
    refuse_context_parallelism(parallel.context_parallel_size)
    grid = Grid(
        place.world_size,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor,
        ep_ranks_per_node=parallel.expert_model_parallel_ranks_per_node,
    )
    if place.world_size == 1:
        return ParallelState.alone()
    minutes = PATIENT_TIMEOUT_MINUTES if patient else parallel.distributed_timeout_minutes
    join(place, device, arguments.distributed_backend, minutes, os.environ)
    return ParallelState.distributed(grid)


def run(arguments: argparse.Namespace, place: Place) -> None:
    """One rank, from joining to the last prompt."""
    device = pick_device(place)
    interactive = arguments.prompt is None and arguments.prompt_file is None
    state = join_ranks(arguments, place, device, patient=interactive)
    session = open_session(arguments, state, device)
    if interactive:
        for number, line in enumerate(typed_lines(session)):
            session.answer([line], number)
    else:
        texts = arguments.prompt or session.told(lambda: prompts_of_file(arguments.prompt_file))
        session.answer(texts, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; every error is one paragraph, from the first rank."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    rank = 0
    try:
        place = find_place(os.environ)
        rank = place.rank
        run(arguments, place)
    except MegatronMoEError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
