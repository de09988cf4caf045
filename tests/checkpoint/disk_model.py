"""What a disk may hold after a power cut: synced things for sure, of the rest any part, in any order."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from tests.checkpoint.samples import Operation


@dataclass
class File:
    data: bytes = b""
    synced: bytes = b""

    def after_cut(self, rng: random.Random) -> bytes:
        """Synced bytes stay; later ones are there, lost, cut short or zero."""
        if self.data == self.synced:
            return self.data
        tail = self.data[len(self.synced) :]
        cut = rng.randint(0, len(tail))
        return self.synced + rng.choice([b"", tail, tail[:cut], tail[:cut] + bytes(len(tail) - cut)])


@dataclass
class Link:
    target: str


@dataclass
class Folder:
    """Names now, names on the disk, and the changes between the two."""

    names: dict[str, "Node"] = field(default_factory=dict)
    synced: dict[str, "Node"] = field(default_factory=dict)
    pending: list[tuple[str, str, "Node | None"]] = field(default_factory=list)

    def change(self, kind: str, name: str, node: "Node | None" = None, new_name: str = "") -> None:
        change = (f"{kind}:{new_name}", name, node)
        self.pending.append(change)
        apply(self.names, change)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.names), []

    def after_cut(self, rng: random.Random, kept: float) -> dict[str, "Node"]:
        """Each change since the last sync may have reached the disk or not; a rename does so as a whole."""
        names = dict(self.synced)
        for change in self.pending:
            if rng.random() < kept:
                apply(names, change)
        return names


Node = File | Link | Folder


def apply(names: dict[str, Node], change: tuple[str, str, Node | None]) -> None:
    kind, _, new_name = change[0].partition(":")
    if kind == "add" and change[2] is not None:
        names[change[1]] = change[2]
    elif kind == "remove":
        names.pop(change[1], None)
    elif kind == "rename" and change[1] in names:
        names[new_name] = names.pop(change[1])


def read_disk(folder: Path) -> Folder:
    """The folder as it is, all of it synced."""
    found = Folder()
    for path in folder.iterdir():
        if path.is_symlink():
            found.names[path.name] = Link(str(path.readlink()))
        elif path.is_dir():
            found.names[path.name] = read_disk(path)
        else:
            found.names[path.name] = File(path.read_bytes(), path.read_bytes())
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
                file.data += operation.data
            else:
                file.synced = file.data


def surviving(folder: Folder, rng: random.Random | None = None, kept: float = 1.0) -> Folder:
    """What is left of it: all (no rng: the process was killed), or what a power cut leaves."""
    names: dict[str, Node] = {}
    for name, node in (folder.names if rng is None else folder.after_cut(rng, kept)).items():
        if isinstance(node, Folder):
            names[name] = surviving(node, rng, kept)
        elif isinstance(node, File):
            names[name] = File(node.data if rng is None else node.after_cut(rng))
        else:
            names[name] = node
    return Folder(names)


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
