"""The hashes of a token file, kept beside it in `<prefix>.hashes.json`, so that a bit that rots is found.

One JSON object: the xxh3-128 of .idx, the size of .bin and the xxh3-128 of each of its blocks, end to end in a string;
and, where it is known, what fingerprint the tokenizer had that made the tokens. Its own hash stands in it too. A pair
without it, as Megatron writes them, is read all the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_moe.config.errors import DataError

FORMAT = 1
# small enough that a window which touches a block first waits a fraction of a millisecond, large enough that the hashes
# of a trillion tokens are some 32 MB
BLOCK_BYTES = 1 << 20
# of a file of hashes that another program wrote
LARGEST_BLOCK = 1 << 26
DIGEST_BYTES = 16
# bytes of .idx read together
PIECE = 1 << 24


def hashes_path(prefix: str | Path) -> Path:
    """The file of hashes."""
    return Path(f"{prefix}.hashes.json")


@dataclass(frozen=True, kw_only=True)
class Hashes:
    """What a pair was when it was written."""

    idx_xxh3_128: str
    bin_bytes: int
    block_bytes: int
    blocks_xxh3_128: str  # hexadecimal, 32 digits for each block of .bin
    tokenizer: str = ""  # Tokenizer.fingerprint(); empty where nobody said

    def to_bytes(self) -> bytes:
        """The file: one way to write it, so that no bit of it can change unseen."""
        table: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        if not self.tokenizer:
            del table["tokenizer"]
        table["xxh3_128"] = xxhash.xxh3_128_hexdigest(_json(table))
        return _json(table)

    def block(self, number: int) -> str:
        """The hash of one block of .bin."""
        return self.blocks_xxh3_128[2 * DIGEST_BYTES * number : 2 * DIGEST_BYTES * (number + 1)]

    def tokens_fingerprint(self) -> str:
        """One hash that changes when any token does."""
        return xxhash.xxh3_128_hexdigest(f"{self.bin_bytes} {self.block_bytes} {self.blocks_xxh3_128}".encode())


def _json(table: dict[str, Any]) -> bytes:
    return json.dumps(table, indent=1).encode() + b"\n"


def read_hashes(prefix: str | Path, *, bin_bytes: int) -> Hashes | None:
    """The hashes beside a pair, or None; DataError if the file is damaged or larger than it can be."""
    path = hashes_path(prefix)
    try:
        with path.open("rb") as file:
            # 2 hexadecimal digits for each byte of a hash, of blocks of 256 bytes or more
            raw = file.read(4096 + bin_bytes // 4)
            longer = bool(file.read(1))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. {way_out(prefix)}") from error
    try:
        table = json.loads(raw)
        if not longer and table.pop("format") == FORMAT and table.pop("xxh3_128"):
            found = Hashes(**table)
            if found.to_bytes() == raw and found.bin_bytes == bin_bytes and _is_complete(found):
                return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise DataError(f"{path} is damaged, or belongs to a .bin of other than {bin_bytes} bytes. {way_out(prefix)}")


def _is_complete(found: Hashes) -> bool:
    """Whether there is a hash for each block, of a size that may be read."""
    size, digits = found.block_bytes, found.blocks_xxh3_128
    if not isinstance(digits, str) or not isinstance(found.tokenizer, str):
        return False
    if type(size) is not int or not 0 < size <= LARGEST_BLOCK:
        return False
    return len(digits) == 2 * DIGEST_BYTES * -(-found.bin_bytes // size)


def way_out(prefix: str | Path) -> str:
    """What to do about a pair that is not what its hashes say."""
    return (
        f"Copy the pair and {hashes_path(prefix).name} again; if the pair was changed on purpose, delete that file and "
        "write it anew with tools/inspect_dataset.py --write-hashes."
    )


class BlockHasher:
    """The hashes of a stream's blocks, as its bytes come in."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.block_bytes = BLOCK_BYTES
        self._done = bytearray()
        self._open = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        """The next bytes (one dimension of bytes)."""
        while data:
            part = data[: self.block_bytes - self.num_bytes % self.block_bytes]
            self._open.update(part)
            self.num_bytes += len(part)
            data = data[len(part) :]
            if self.num_bytes % self.block_bytes == 0:
                self._close()

    def hexdigests(self) -> str:
        """End to end, the last block as far as it goes."""
        rest = self._open.hexdigest() if self.num_bytes % self.block_bytes else ""
        return self._done.hex() + rest

    def _close(self) -> None:
        self._done += self._open.digest()
        self._open.reset()


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, in bounded memory."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def hash_pair(idx_path: Path, bin_path: Path) -> Hashes:
    """The hashes of a pair as it lies on the disk; reads all of it."""
    blocks = BlockHasher()
    with bin_path.open("rb") as file:
        while piece := file.read(PIECE):
            blocks.update(memoryview(piece))
    return Hashes(
        idx_xxh3_128=hash_file(idx_path),
        bin_bytes=blocks.num_bytes,
        block_bytes=blocks.block_bytes,
        blocks_xxh3_128=blocks.hexdigests(),
    )


@dataclass(frozen=True)
class Speed:
    """How long it took to read bytes and to hash them."""

    num_bytes: int
    reading_seconds: float
    hashing_seconds: float

    @property
    def read_gb_per_s(self) -> float:
        """Reading alone."""
        return self.num_bytes / max(self.reading_seconds, 1e-9) / 1e9

    @property
    def verified_gb_per_s(self) -> float:
        """Reading and hashing, one after the other."""
        return self.num_bytes / max(self.reading_seconds + self.hashing_seconds, 1e-9) / 1e9


class BlockChecker:
    """Compares each block of an open .bin with its hash when it is first asked for; threads may share it."""

    def __init__(self, hashes: Hashes, prefix: str, read: Callable[[int, int], bytes]) -> None:
        """read(size, start): bytes of .bin."""
        self.hashes, self.prefix = hashes, prefix
        self._read = read
        # a byte for each block; two threads that meet at one both check it, to the same end
        self._right = bytearray(-(-hashes.bin_bytes // hashes.block_bytes))

    def check(self, start: int, stop: int) -> None:
        """Bytes start..stop-1 of .bin belong to blocks that are right; DataError names the first that is not."""
        if start >= stop:
            return
        size = self.hashes.block_bytes
        for number in range(start // size, (stop - 1) // size + 1):
            if not self._right[number]:
                self.check_block(number, self._read(size, number * size))

    def check_all(self) -> Speed:
        """Reads all of .bin in order and compares every block."""
        reading = hashing = 0.0
        size = self.hashes.block_bytes
        for number in range(len(self._right)):
            begin = time.perf_counter()
            content = self._read(size, number * size)
            middle = time.perf_counter()
            self.check_block(number, content)
            reading, hashing = reading + middle - begin, hashing + time.perf_counter() - middle
        return Speed(self.hashes.bin_bytes, reading, hashing)

    def check_block(self, number: int, content: bytes | memoryview) -> None:
        """A block's bytes against its hash."""
        found, expected = xxhash.xxh3_128_hexdigest(content), self.hashes.block(number)
        if found != expected:
            start = number * self.hashes.block_bytes
            raise DataError(
                f"{self.prefix}.bin: bytes {start} to {start + len(content) - 1} are damaged: their xxh3-128 is {found}"
                f" and was {expected} when they were written. {way_out(self.prefix)}"
            )
        self._right[number] = 1
