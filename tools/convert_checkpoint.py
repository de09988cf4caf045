"""Converts checkpoints to and from Hugging Face's Mixtral, OLMoE and Qwen3-MoE, and from Megatron-LM's GPT models.

Examples:
    python tools/convert_checkpoint.py export --load runs/quickstart/checkpoint --output runs/quickstart/hf
    python tools/convert_checkpoint.py export --load ckpt --step 12000 --output hf --model-type qwen3_moe --dtype bf16
    python tools/convert_checkpoint.py import --hf-folder OLMoE-1B-7B-0924 --save ckpt-olmoe
    python tools/convert_checkpoint.py import-megatron --megatron-folder megatron/ckpt --save ckpt --allow-pickle
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.errors import MegatronMoEError
from megatron_moe.convert.export import ExportOptions, export_checkpoint
from megatron_moe.convert.hf_writer import parse_size
from megatron_moe.convert.import_ import import_folder
from megatron_moe.convert.megatron.import_ import MegatronOptions, import_megatron
from megatron_moe.convert.registry import AUTO, FAMILIES
from megatron_moe.convert.tensors import PROJECT_DTYPES


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    out = directions.add_parser(
        "export", help="a checkpoint of this project as a Hugging Face folder", allow_abbrev=False
    )
    out.add_argument(
        "--load", type=Path, required=True, metavar="DIR", help="checkpoint directory (with step_ folders)"
    )
    out.add_argument("--step", type=int, metavar="N", help="default: the newest valid checkpoint")
    out.add_argument("--output", type=Path, required=True, metavar="HF_DIR", help="a folder that does not exist yet")
    out.add_argument(
        "--model-type", default=AUTO, choices=[AUTO, *FAMILIES], help="auto: the first that can express it"
    )
    out.add_argument("--dtype", choices=list(PROJECT_DTYPES), help="default: as trained")
    out.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file; default 5GB")
    tokenizer = out.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer-model", metavar="PATH", help="where the tokenizer is now, if it has moved")
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer files")
    back = directions.add_parser("import", help="a Hugging Face folder as a checkpoint at step 0", allow_abbrev=False)
    back.add_argument("--hf-folder", type=Path, required=True, metavar="DIR", help="the folder that holds config.json")
    back.add_argument(
        "--save", type=Path, required=True, metavar="DIR", help="checkpoint directory to write step 0 into"
    )
    _add_megatron(directions)
    return parser


def _add_megatron(directions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    megatron = directions.add_parser(
        "import-megatron",
        help="a Megatron-LM checkpoint (torch_dist or torch) as a checkpoint at step 0, weights only",
        allow_abbrev=False,
    )
    megatron.add_argument(
        "--megatron-folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder with latest_checkpointed_iteration.txt, or one iter_ folder",
    )
    megatron.add_argument(
        "--save", type=Path, required=True, metavar="DIR", help="checkpoint directory to write step 0 into"
    )
    megatron.add_argument("--iteration", type=int, metavar="N", help="default: the one that the tracker file names")
    megatron.add_argument(
        "--vocab-size",
        type=int,
        metavar="V",
        help="token ids, with that of the end of a document; default: all rows of the embedding, padding too",
    )
    megatron.add_argument(
        "--allow-pickle",
        action="store_true",
        help="Megatron's files are pickles, which can run code when opened: let a confined child process open them",
    )
    megatron.add_argument(
        "--with-optimizer", action="store_true", help="refused: the optimizer's state is not converted"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; every error is one paragraph."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.direction == "import":
            import_folder(arguments.hf_folder, arguments.save)
            return 0
        if arguments.direction == "import-megatron":
            wanted = MegatronOptions(
                iteration=arguments.iteration,
                pickles_allowed=arguments.allow_pickle,
                with_optimizer=arguments.with_optimizer,
                vocab_size=arguments.vocab_size,
            )
            import_megatron(arguments.megatron_folder, arguments.save, wanted)
            return 0
        options = ExportOptions(
            model_type=arguments.model_type,
            dtype=arguments.dtype,
            max_shard_bytes=parse_size(arguments.max_shard_size),
            tokenizer_model=arguments.tokenizer_model,
            with_tokenizer=not arguments.no_tokenizer,
        )
        export_checkpoint(arguments.load, arguments.output, step=arguments.step, options=options)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
