"""Turns text into the token files (.bin/.idx) that training reads.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model spm.model --append-eod --workers 8

Reads .jsonl, .txt (each also .gz or .zst) and .parquet; documents keep the order of the input, whatever --workers is.
Writes <output-prefix>_<key>_document.bin and .idx, which Megatron-LM reads too, or, if anything fails, nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megatron_moe.config.errors import MegatronMoEError
from megatron_moe.data.preprocess import PreprocessOptions, Progress, preprocess
from megatron_moe.data.tokenizer import TOKENIZER_TYPES, TokenizerFiles

SKIPS_SHOWN = 10


class Display:
    """A progress bar on a terminal, a line every `log_interval` documents elsewhere; everything goes to stderr."""

    def __init__(self, log_interval: int) -> None:
        self._console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("reading", total=None)
        self._log_interval, self._next_line = log_interval, log_interval
        self._started = time.monotonic()
        self._num_skipped = 0

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, progress: Progress) -> None:
        """Shows where the work stands."""
        if self._console.is_terminal:
            self._bar.update(
                self._task,
                description=f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens",
                completed=progress.bytes_read,
                total=progress.bytes_total,
            )
        elif progress.num_documents >= self._next_line:
            self._next_line = (progress.num_documents // self._log_interval + 1) * self._log_interval
            print(describe(progress, seconds=time.monotonic() - self._started), file=sys.stderr, flush=True)

    def skipped(self, problem: str) -> None:
        """Shows the first records that were left out."""
        self._num_skipped += 1
        if self._num_skipped <= SKIPS_SHOWN:
            self._console.print(f"skipped {problem}", markup=False, highlight=False, soft_wrap=True)
        if self._num_skipped == SKIPS_SHOWN:
            self._console.print("further skipped records are only counted", markup=False)


def describe(progress: Progress, *, seconds: float) -> str:
    """One line for logs."""
    share = 100 * progress.bytes_read / max(progress.bytes_total, 1)
    speed = progress.bytes_read / max(seconds, 1e-3) / 1e6
    return (
        f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens, {progress.num_skipped:,} skipped, "
        f"{share:.0f} % of the input, {speed:.1f} MB/s"
    )


def build_parser() -> argparse.ArgumentParser:
    """The flags, in Megatron's spelling."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="files, or quoted patterns: 'data/*.jsonl.zst'"
    )
    text.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys or columns, a pair of files each"
    )
    text.add_argument(
        "--text-document",
        choices=["file", "paragraph", "line"],
        default="file",
        help="one document of a .txt file (file)",
    )
    text.add_argument("--max-documents", type=int, metavar="N", help="stop after this many documents")
    text.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="at a record that cannot be read")
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", choices=list(TOKENIZER_TYPES), required=True)
    tokens.add_argument("--tokenizer-model", metavar="PATH", help="SentencePiece .model, tokenizer.json or its folder")
    tokens.add_argument("--vocab-file", metavar="PATH", help="vocab.json of GPT2BPETokenizer")
    tokens.add_argument("--merge-file", metavar="PATH", help="merges.txt of GPT2BPETokenizer")
    tokens.add_argument("--vocab-size", type=int, metavar="N", help="ids of NullTokenizer; the last ends a document")
    tokens.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="PATH")
    output.add_argument("--overwrite", action="store_true", help="replace files that exist")
    output.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (1)")
    output.add_argument(
        "--log-interval", type=int, default=10000, metavar="N", help="documents between lines of progress (10000)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = build_parser()
    given = parser.parse_args(argv)
    if given.log_interval < 1:
        parser.error("--log-interval must be at least 1")
    options = PreprocessOptions(
        inputs=tuple(given.input),
        output_prefix=given.output_prefix,
        tokenizer=TokenizerFiles(
            given.tokenizer_type, given.tokenizer_model, given.vocab_file, given.merge_file, given.vocab_size
        ),
        json_keys=tuple(given.json_keys),
        append_eod=given.append_eod,
        workers=given.workers,
        max_documents=given.max_documents,
        on_error=given.on_error,
        text_document=given.text_document,
        overwrite=given.overwrite,
    )
    try:
        with Display(given.log_interval) as display:
            result = preprocess(options, report=display.report, skipped=display.skipped)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    skips = f", {result.num_skipped:,} records skipped" if result.num_skipped else ""
    print(f"{result.num_documents:,} documents, {result.num_tokens:,} tokens{skips}")
    for prefix in result.prefixes:
        print(f"--data-path {prefix}")
    return 0


def _stop(number: int, frame: object) -> None:
    # as Ctrl-C, so that nothing half-written stays
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
