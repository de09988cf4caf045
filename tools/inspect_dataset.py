"""Shows what is in token files (.bin/.idx): counts, lengths, a document; --verify reads and checks every byte.

A pair that Megatron wrote gets its hashes (.hashes.json), by which damage is found, with --write-hashes.

Examples:
    python tools/inspect_dataset.py data/corpus_text_document --verify
    python tools/inspect_dataset.py data/from_megatron --write-hashes
    python tools/inspect_dataset.py data/corpus_text_document --document 3 --tokenizer-type ByteTokenizer
    python tools/inspect_dataset.py data/corpus_text_document --token-counts counts.npy --vocab-size 50304
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.config.errors import ConfigError, DataError, MegatronMoEError, StorageError
from megatron_moe.config.whole_file import write_whole
from megatron_moe.data.hashes import hash_pair, hashes_path
from megatron_moe.data.indexed_dataset import CHUNK, IndexedDataset, IntArray
from megatron_moe.data.tokenizer import TOKENIZER_TYPES, TokenizerFiles, open_tokenizer


def summary(dataset: IndexedDataset) -> dict[str, Any]:
    """Counts and lengths; reads the lengths in bounded pieces."""
    pieces = [dataset.lengths[start : start + CHUNK] for start in range(0, len(dataset), CHUNK)]
    return {
        "prefix": dataset.prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "shortest_sequence": min((int(piece.min()) for piece in pieces), default=0),
        "longest_sequence": max((int(piece.max()) for piece in pieces), default=0),
        "fingerprint": dataset.fingerprint(),
        "tokenizer": dataset.tokenizer_fingerprint(),
    }


def verify(dataset: IndexedDataset, *, vocab_size: int | None) -> dict[str, Any]:
    """Compares every byte with its hash, where there are some, checks the whole index and reads every token.

    DataError for damage, or a token outside the vocabulary.
    """
    hashes: dict[str, Any] = {"hashes": "none: write them with --write-hashes"}
    if dataset.checker is not None:
        speed = dataset.checker.check_all()
        hashes = {"hashes": "all right", "read_gb_per_s": round(speed.read_gb_per_s, 2)}
        hashes["read_and_hashed_gb_per_s"] = round(speed.verified_gb_per_s, 2)
    dataset.verify_index()
    largest = max((int(np.max(piece)) for piece in checked_pieces(dataset, vocab_size=vocab_size)), default=-1)
    return {"verified": True, "largest_token": largest, **hashes}


def write_hashes(dataset: IndexedDataset) -> dict[str, Any]:
    """Writes the hashes of a pair that has none; ConfigError if it has some, which are never replaced in passing."""
    path = hashes_path(dataset.prefix)
    if dataset.checker is not None:
        raise ConfigError(
            f"{path} is there already; --verify compares the pair with it. If the pair was changed on purpose, "
            "delete that file first."
        )
    dataset.verify_index()
    try:
        write_whole(path, hash_pair(dataset.idx_path, dataset.bin_path).to_bytes())
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}; nothing was left there.") from error
    return {"hashes": str(path)}


def checked_pieces(dataset: IndexedDataset, *, vocab_size: int | None) -> Iterator[IntArray]:
    """All tokens in bounded pieces; DataError if one is outside the vocabulary."""
    for start in range(0, dataset.num_tokens, CHUNK):
        piece = dataset.tokens(start, start + CHUNK)
        smallest, largest = int(np.min(piece)), int(np.max(piece))
        if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
            bad = smallest if smallest < 0 else largest
            raise DataError(
                f"{dataset.bin_path} holds token {bad} among the tokens from {start} on; expected 0 up to "
                f"{'any' if vocab_size is None else vocab_size - 1}. Make the corpus again with the right tokenizer."
            )
        yield piece


def write_token_counts(dataset: IndexedDataset, path: str, *, vocab_size: int | None) -> dict[str, Any]:
    """Writes (V,) int64, how often each id occurs, as a .npy file: what the router hash balances its table by."""
    if not path.endswith(".npy"):
        raise ConfigError(f"--token-counts {path}: expected a name that ends in .npy.")
    if vocab_size is None:
        raise ConfigError("--token-counts needs to know how many ids there are; give --vocab-size or --tokenizer-type.")
    counts = np.zeros(vocab_size, np.int64)
    for piece in checked_pieces(dataset, vocab_size=vocab_size):
        counts += np.bincount(piece, minlength=vocab_size)
    try:
        np.save(Path(path), counts)
    except OSError as error:
        raise StorageError(f"--token-counts {path} cannot be written: {error.strerror}.") from error
    return {"token_counts": path, "ids_that_occur": int((counts > 0).sum())}


def show_document(dataset: IndexedDataset, number: int, files: TokenizerFiles) -> dict[str, Any]:
    """The tokens of a document, and its text if a tokenizer is named."""
    if not 0 <= number < dataset.num_documents:
        raise ConfigError(
            f"--document {number} is outside 0..{dataset.num_documents - 1}, the documents of {dataset.prefix}."
        )
    sequences = [[int(token) for token in sequence] for sequence in dataset.document(number)]
    shown: dict[str, Any] = {"document": number, "token_ids": sequences}
    if files.kind is not None:
        tokenizer = open_tokenizer(files)
        shown["text"] = [tokenizer.decode(sequence) for sequence in sequences]
    return shown


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prefix", help="path without .bin/.idx")
    parser.add_argument("--verify", action="store_true", help="check the whole index and read every token")
    parser.add_argument("--write-hashes", action="store_true", help="write <prefix>.hashes.json for a pair without")
    parser.add_argument("--document", type=int, metavar="N", help="show document N, from 0")
    parser.add_argument(
        "--token-counts", metavar="FILE.npy", help="write how often each id occurs, for the router hash"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--tokenizer-type", choices=list(TOKENIZER_TYPES), help="to show text and check ids")
    parser.add_argument("--tokenizer-model", metavar="PATH")
    parser.add_argument("--vocab-file", metavar="PATH")
    parser.add_argument("--merge-file", metavar="PATH")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="ids of the corpus; ids of NullTokenizer")
    return parser


def inspect(given: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for."""
    files = TokenizerFiles(
        given.tokenizer_type, given.tokenizer_model, given.vocab_file, given.merge_file, given.vocab_size
    )
    dataset = IndexedDataset(given.prefix)
    found = summary(dataset)
    sizes = [given.vocab_size]
    if files.kind and (given.verify or given.token_counts):
        sizes.append(open_tokenizer(files).vocab_size)
    vocab_size = min((size for size in sizes if size), default=None)
    if given.write_hashes:
        found |= write_hashes(dataset)
        dataset = IndexedDataset(given.prefix)
    if given.verify:
        found |= verify(dataset, vocab_size=vocab_size)
    if given.token_counts:
        found |= write_token_counts(dataset, given.token_counts, vocab_size=vocab_size)
    if given.document is not None:
        found |= show_document(dataset, given.document, files)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    given = build_parser().parse_args(argv)
    try:
        found = inspect(given)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if given.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:18} {value:,}" if type(value) is int else f"{name:18} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
