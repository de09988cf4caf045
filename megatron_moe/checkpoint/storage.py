"""Every change that a checkpoint makes to a disk, one method each.

Tests put a recording or a failing disk in its place.
"""

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_moe.config.whole_file import sync_folder

# a write from this size on goes to the disk at once; past the page cache if memory and place are multiples of a page
DIRECT_BYTES = 1 << 20
PAGE_BYTES = 4096


class Storage:
    """The operating system's files. Every method raises OSError when it fails."""

    def make_dir(self, path: Path) -> None:
        """A new folder; its parent exists and it does not."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """A new file, opened for writing; fails if anything of that name exists, a link too."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, file: int, data: memoryview) -> int:
        """Append bytes; returns how many were taken, which may be fewer than given."""
        if len(data) >= DIRECT_BYTES:
            return _write_large(file, data)
        return os.write(file, data)

    def fsync(self, file: int) -> None:
        """Return when the file's bytes are on the disk."""
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def sync_dir(self, path: Path) -> None:
        """Return when the names in a folder are on the disk."""
        sync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        """Atomic; replaces a file or a link, never a folder that holds something."""
        os.rename(old, new)

    def symlink(self, target: str, link: Path) -> None:
        os.symlink(target, link)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        """An empty folder."""
        os.rmdir(path)


def _write_large(file: int, data: memoryview) -> int:
    """Without a copy in between where the file system can, else with the disk told to begin, long before the fsync.

    Either way, what is saved does not crowd out of the cache what a run still reads.
    """
    whole = len(data) // PAGE_BYTES * PAGE_BYTES
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    if address % PAGE_BYTES == 0 and os.lseek(file, 0, os.SEEK_CUR) % PAGE_BYTES == 0:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
            return os.write(file, data[:whole])
        except OSError as error:
            # what file systems say that cannot do this at all, or not at such places
            if error.errno != errno.EINVAL:
                raise
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
    taken = os.write(file, data)
    with suppress(OSError):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return taken


# large enough that calls cost nothing, small enough that a full disk is noticed early
CHUNK_BYTES = 32 << 20


def append(storage: Storage, file: int, data: memoryview) -> None:
    """Write all of `data` (bytes, one dimension), however little the storage takes at a time."""
    position = 0
    while position < len(data):
        taken = storage.write(file, data[position : position + CHUNK_BYTES])
        if taken <= 0:
            raise OSError(errno.EIO, "the storage took no bytes")
        position += taken


def write_file(storage: Storage, path: Path, *parts: memoryview) -> None:
    """A new file with these bytes, on the disk when this returns (its name is not: sync the folder)."""
    file = storage.create(path)
    try:
        for part in parts:
            append(storage, file, part)
        storage.fsync(file)
    finally:
        storage.close(file)


def remove_tree(storage: Storage, folder: Path) -> None:
    """A folder and all in it; links are removed, not followed."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(storage, entry)
        else:
            storage.unlink(entry)
    storage.remove_dir(folder)


def make_dirs(storage: Storage, folder: Path) -> None:
    """A folder and those above it, as far as they are missing."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        storage.make_dir(path)
        storage.sync_dir(path.parent)


def describe_failure(error: OSError, path: Path, need: int) -> str:
    """What failed, how much room is needed and how much there is."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    try:
        free = f"{shutil.disk_usage(existing).free:,} bytes are free"
    except OSError:
        free = "free space is unknown"
    reason = error.strerror or str(error)
    return f"cannot write {path}: {reason} (errno {error.errno}); this save needs {need:,} bytes there and {free}"
