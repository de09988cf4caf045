"""Continues text with a trained checkpoint, on any layout.

Examples:
    python tools/generate.py --load runs/quickstart/checkpoint --prompt "import os" --max-new-tokens 50
    python -m megatron_moe.launch --nproc-per-node 4 tools/generate.py --load ckpt --prompt "Once" \\
        --tensor-model-parallel-size 2 --expert-model-parallel-size 2
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_moe.config.errors import ConfigError, MegatronMoEError
from megatron_moe.data.tokenizer import build_tokenizer
from megatron_moe.inference.generate import Generator
from megatron_moe.inference.sampling import Sampling
from megatron_moe.models.load import load_model
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.launch import find_place, join, leave, pick_device
from megatron_moe.parallel.state import ParallelState


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="checkpoint directory of a run")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="default: the newest valid checkpoint")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="where the tokenizer is now, if it has moved")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given repeatedly")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line; default: standard input")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--greedy", action="store_true", help="the best token each time; the same as --temperature 0")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k best tokens; 0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the best tokens of that probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--expert-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--expert-tensor-parallel-size", type=int, metavar="N", help="default: as tensor parallelism")
    return parser


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts, from wherever they were given. Raises ConfigError when there are none."""
    if arguments.prompt:
        return list(arguments.prompt)
    if arguments.prompt_file:
        try:
            lines = arguments.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {arguments.prompt_file} cannot be read: {error}") from error
    else:
        lines = sys.stdin.read().splitlines()
    found = [line for line in lines if line]
    if not found:
        raise ConfigError("there is no prompt; give --prompt TEXT, --prompt-file FILE, or lines on standard input.")
    return found


def run(arguments: argparse.Namespace) -> None:
    """Generate and print."""
    if arguments.greedy and arguments.temperature != 1.0:
        raise ConfigError(f"--temperature {arguments.temperature:g} has no effect with --greedy; give one of them.")
    temperature = 0.0 if arguments.greedy else arguments.temperature
    sampling = Sampling(temperature=temperature, top_k=arguments.top_k, top_p=arguments.top_p)
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {arguments.max_new_tokens} must be at least 1.")
    place = find_place(os.environ)
    prompts = read_prompts(arguments)
    device = pick_device(place)
    grid = Grid(
        place.world_size,
        tp=arguments.tensor_model_parallel_size,
        pp=arguments.pipeline_model_parallel_size,
        ep=arguments.expert_model_parallel_size,
        etp=arguments.expert_tensor_parallel_size or arguments.tensor_model_parallel_size,
    )
    state = ParallelState.alone()
    if place.world_size > 1:
        join(place, device, "auto", 10.0, os.environ)
        state = ParallelState.distributed(grid)
    model = load_model(
        arguments.load, step=arguments.ckpt_step, state=state, device=device, tokenizer_model=arguments.tokenizer_model
    )
    tokenizer = build_tokenizer(model.config.data, model.config.model.vocab_size)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    answers = Generator(model, arguments.seed).generate(ids, arguments.max_new_tokens, sampling, tokenizer.eod_id)
    if place.rank == 0:
        for prompt, answer in zip(prompts, answers, strict=True):
            kept = answer[:-1] if answer and answer[-1] == tokenizer.eod_id else answer
            print(prompt + tokenizer.decode(kept), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; every error is one paragraph."""
    arguments = build_parser().parse_args(argv)
    torch.set_grad_enabled(False)
    try:
        run(arguments)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
