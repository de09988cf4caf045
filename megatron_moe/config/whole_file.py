"""A file that others read is whole or not there at all, whenever the process that writes it is killed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# some network file systems cannot sync a folder and say so with one of these
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace a file in one step; on the disk when this returns, text as UTF-8. Raises OSError.

    It is written as `<path>.partial` first, beside where it goes: what a kill leaves of it, the next write replaces.
    A link or a device is written through, for what it stands for is not ours to replace.
    """
    raw = content.encode() if isinstance(content, str) else content
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(raw)
        return
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)
