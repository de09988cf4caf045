"""Joins several token files (.bin/.idx) into one, in the order in which they are named.

    python tools/merge_datasets.py --input data/part1_text_document data/part2_text_document --output-prefix data/all

A folder stands for all pairs in it, sorted by name. The inputs stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.errors import DataError, MegatronMoEError
from megatron_moe.data.indexed_writer import merge


def expand(inputs: Sequence[str]) -> list[str]:
    """Prefixes as they are, folders as the prefixes of the pairs in them."""
    prefixes: list[str] = []
    for given in inputs:
        if not Path(given).is_dir():
            prefixes.append(given)
            continue
        found = sorted(str(path)[: -len(".idx")] for path in Path(given).glob("*.idx"))
        if not found:
            raise DataError(
                f"--input {given} is a folder without .idx files; name the folder of the pairs, or their prefixes."
            )
        prefixes += found
    return prefixes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="prefixes of pairs, or folders of them"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    given = parser.parse_args(argv)
    try:
        prefixes = expand(given.input)
        num_documents = merge(prefixes, given.output_prefix, overwrite=given.overwrite)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{num_documents:,} documents of {len(prefixes)} corpora\n--data-path {given.output_prefix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
