"""A real corpus without a download: the sources of the running Python's standard library, as JSON lines."""

import json
import sysconfig
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3", "ensurepip"}


def source_files(root: Path) -> list[Path]:
    """The library's modules in a fixed order, its tests left out."""
    found = [path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts)]
    # neighbours in a folder resemble each other: spread them, so that training and validation see the same kinds
    return sorted(found, key=lambda path: (hash_of(path.relative_to(root).as_posix()), path))


def hash_of(name: str) -> int:
    """A fixed number for a name (FNV-1a, 32 bits)."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def gather(output: Path) -> tuple[int, int]:
    """Write one document a line; returns (documents, bytes of text)."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = size = 0
    with output.open("w", encoding="utf-8") as file:
        for path in source_files(root):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a few modules are written in older encodings
            if text:
                file.write(json.dumps({"text": text, "source": path.relative_to(root).as_posix()}) + "\n")
                documents += 1
                size += len(text.encode())
    return documents, size


def texts(corpus: Path) -> list[str]:
    """The documents of a corpus that `gather` wrote."""
    with corpus.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]
