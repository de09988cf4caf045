"""What a disk may hold after a power cut: synced things for sure, of the rest any part, in any order."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from pathlib import Path

from tests.checkpoint.samples import Operation


@dataclass
class File:
    """synced: so many bytes are on the disk for sure; ends: where each write ended."""

    data: bytes = b""
    synced: int = 0
    ends: list[int] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        self.data += data
        self.ends.append(len(self.data))

    def contents(self) -> list[bytes]:
        """The synced bytes, then none, some or all later writes, and each of these with zeros up to the full length."""
        kept = [self.data[:end] for end in (self.synced, *self.ends) if end >= self.synced]
        filled = [part + bytes(len(self.data) - len(part)) for part in kept]
        return list(dict.fromkeys(kept + filled))


@dataclass
class Link:
    target: str


# what becomes of which name; a rename gives the node a new one
Change = tuple[str, str, "Node | None", str]


@dataclass
class Folder:
    """Names now, names on the disk, and the changes between the two."""

    names: dict[str, "Node"] = field(default_factory=dict)
    synced: dict[str, "Node"] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def change(self, kind: str, name: str, node: "Node | None" = None, new_name: str = "") -> None:
        change = (kind, name, self.names[name] if kind == "rename" else node, new_name)
        self.pending.append(change)
        apply(self.names, change)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.names), []

    def namings(self) -> Iterator[dict[str, "Node"]]:
        """Each change since the last sync may have reached the disk or not; a rename does so as a whole."""
        known = set()
        for count in range(len(self.pending) + 1):
            for kept in combinations(self.pending, count):
                names = dict(self.synced)
                for change in kept:
                    apply(names, change)
                key = frozenset((name, id(node)) for name, node in names.items())
                if key not in known:
                    known.add(key)
                    yield names


Node = File | Link | Folder


def apply(names: dict[str, Node], change: Change) -> None:
    kind, name, node, new_name = change
    if kind != "add":
        names.pop(name, None)
    if node is not None:
        # a rename may be on the disk without what came before it, so it brings its node along
        names[new_name or name] = node


def read_disk(folder: Path) -> Folder:
    """The folder as it is, all of it synced."""
    found = Folder()
    for path in folder.iterdir():
        if path.is_symlink():
            found.names[path.name] = Link(str(path.readlink()))
        elif path.is_dir():
            found.names[path.name] = read_disk(path)
        else:
            found.names[path.name] = File(path.read_bytes(), path.stat().st_size)
    found.sync()
    return found


def folder_at(root: Folder, path: str) -> Folder:
    node: Node = root
    for name in Path(path).parts:
        assert isinstance(node, Folder)
        node = node.names[name]
    assert isinstance(node, Folder)
    return node


def play(root: Folder, operation: Operation) -> None:
    """Do to the model what was done to the real folder."""
    path = Path(operation.path)
    if operation.kind == "sync_dir":
        folder_at(root, operation.path).sync()
        return
    parent = folder_at(root, str(path.parent))
    match operation.kind:
        case "make_dir":
            parent.change("add", path.name, Folder())
        case "create":
            parent.change("add", path.name, File())
        case "symlink":
            parent.change("add", path.name, Link(operation.other))
        case "unlink" | "remove_dir":
            parent.change("remove", path.name)
        case "rename":
            parent.change("rename", path.name, new_name=Path(operation.other).name)
        case "write" | "fsync":
            file = parent.names[path.name]
            assert isinstance(file, File)
            if operation.kind == "write":
                file.write(operation.data)
            else:
                file.synced = len(file.data)


def is_looked_at(name: str) -> bool:
    """Whether the reader may care for this name in a folder of checkpoints."""
    return name == "latest" or (name.startswith("step_") and ".tmp-" not in name)


def survivors(root: Folder) -> Iterator[Folder]:
    """All that a kill or a power cut can leave in a folder of checkpoints, without what the reader never looks at."""
    for names in root.namings():
        for nodes in _together([(name, node) for name, node in names.items() if is_looked_at(name)]):
            yield Folder(nodes)


def _together(entries: list[tuple[str, Node]]) -> Iterator[dict[str, Node]]:
    if not entries:
        yield {}
        return
    name, node = entries[0]
    for found in _left_of(node):
        for others in _together(entries[1:]):
            yield {name: found, **others}


def _left_of(node: Node) -> Iterator[Node]:
    if isinstance(node, Folder):
        for names in node.namings():
            yield from map(Folder, _together(list(names.items())))
    elif isinstance(node, File):
        yield from map(File, node.contents())
    else:
        yield node


def count_survivors(node: Node) -> int:
    """How many states there are of all that is below, also of what the reader never looks at."""
    if isinstance(node, Folder):
        return sum(prod(map(count_survivors, names.values())) for names in node.namings())
    return len(node.contents()) if isinstance(node, File) else 1


def put_on_disk(folder: Folder, where: Path) -> None:
    """Make the folder real, in an absent place."""
    where.mkdir()
    for name, node in folder.names.items():
        if isinstance(node, Folder):
            put_on_disk(node, where / name)
        elif isinstance(node, Link):
            (where / name).symlink_to(node.target)
        else:
            (where / name).write_bytes(node.data)
