"""Rows of a Parquet file, in bounded memory: a few kilobytes can be made to unpack to terabytes.

A file says beforehand how large each column is in each of its groups of rows. No value can be larger than that, but
each row of a group can hold one that large (a dictionary, or a prefix that many share, is stored once). So a group that
is too large is refused, and no more rows are unpacked at a time than fit if each were that large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import DataError
from megatron_moe.config.optional import require

# of one column in one group of rows, uncompressed; writers make groups of 1 GB at most
MAX_GROUP_BYTES = 1 << 31
# of one column, unpacked at a time: as much as the largest group, so that one row always fits
MAX_UNPACKED_BYTES = MAX_GROUP_BYTES
ROWS_AT_A_TIME = 256


def read_rows(path: Path, keys: Sequence[str], *, longest: int) -> Iterator[dict[str, Any] | None]:
    """The named columns of each row; None for a row with a text of more than `longest` bytes.

    Raises DataError if the file is damaged, lacks a column, or has a group that is too large.
    """
    parquet = require("pyarrow.parquet", extra="data")
    arrow = require("pyarrow", extra="data")
    try:
        with parquet.ParquetFile(path) as file:
            missing = [key for key in keys if key not in file.schema_arrow.names]
            if missing:
                raise DataError(
                    f"{path} has no column '{missing[0]}'; --json-keys names columns too, and it has: "
                    f"{', '.join(file.schema_arrow.names)}."
                )
            for group in range(file.num_row_groups):
                rows = _rows_at_a_time(path, file.metadata, group, keys)
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=list(keys)):
                    for row in batch.to_pylist():
                        yield None if any(_is_longer(value, longest) for value in row.values()) else row
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file or is damaged ({error}); copy it again.") from error


def _rows_at_a_time(path: Path, metadata: Any, group: int, keys: Sequence[str]) -> int:
    found = metadata.row_group(group)
    largest = 1
    for number in range(found.num_columns):
        column = found.column(number)
        size = column.total_uncompressed_size
        if column.path_in_schema.partition(".")[0] not in keys:
            continue
        if not 0 <= size <= MAX_GROUP_BYTES:
            raise DataError(
                f"{path}: column '{column.path_in_schema}' unpacks from {column.total_compressed_size:,} to {size:,} "
                f"bytes in group {group} of its rows; at most {MAX_GROUP_BYTES:,} are unpacked. If the file is to be "
                "trusted, write it again with smaller groups of rows (pyarrow: row_group_size)."
            )
        largest = max(largest, size)
    return max(1, min(ROWS_AT_A_TIME, MAX_UNPACKED_BYTES // largest))


def _is_longer(value: Any, longest: int) -> bool:
    """By its UTF-8 bytes, counted only where the letters alone leave a doubt."""
    if isinstance(value, str):
        return len(value) > longest or (4 * len(value) > longest and len(value.encode()) > longest)
    return isinstance(value, bytes) and len(value) > longest
