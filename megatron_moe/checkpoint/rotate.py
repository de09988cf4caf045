"""Which checkpoints a folder holds, which of them may go, and sweeping up what interrupted runs left."""

import logging
import os
import re
from pathlib import Path

from megatron_moe.checkpoint.storage import Storage, remove_tree
from megatron_moe.checkpoint.verify import look
from megatron_moe.config.errors import CheckpointError

LATEST = "latest"
REMOVED = ".tmp-removed"  # end of the name of a checkpoint that is being removed
_STEP = re.compile(r"step_([0-9]{8,18})")
_LEFT_OVER = re.compile(r"(step_[0-9]{8,18}|latest)\.tmp-.+")

logger = logging.getLogger(__name__)


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def stored_steps(root: Path) -> list[int]:
    """Steps of which there is a folder, newest first, valid or not."""
    if not root.is_dir():
        return []
    steps = {step for name in os.listdir(root) if (step := step_of(name)) is not None}
    return sorted(steps, reverse=True)


def step_of(name: str) -> int | None:
    """The step whose folder has this name; None for other names."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_folder(Path(), int(match[1])).name == name else None


def left_overs(root: Path) -> list[Path]:
    """What saves and rotations that were cut short have left, or are at work on."""
    names = sorted(os.listdir(root)) if root.is_dir() else []
    return [root / name for name in names if _LEFT_OVER.fullmatch(name)]


def sweep(storage: Storage, root: Path) -> None:
    """Remove what saves and rotations that were cut short have left; a failure is logged only."""
    for path in left_overs(root):
        discard(storage, path)


def discard(storage: Storage, path: Path) -> None:
    """Remove a folder or file that nobody needs; a failure is logged only."""
    try:
        if path.is_dir() and not path.is_symlink():
            remove_tree(storage, path)
        elif os.path.lexists(path):
            storage.unlink(path)
    except OSError as error:
        logger.warning("cannot remove %s: %s; the next start tries again", path, error)


def point_latest(storage: Storage, root: Path, step: int, mark: str) -> None:
    """Make the link `latest`, which is for people only, name this step; a failure is logged only."""
    link = root / f"{LATEST}.tmp-{mark}"
    try:
        if os.path.lexists(link):
            storage.unlink(link)
        storage.symlink(step_folder(root, step).name, link)
        storage.rename(link, root / LATEST)
        storage.sync_dir(root)
    except OSError as error:
        logger.warning("cannot set the link %s: %s; loading does not need it", root / LATEST, error)
        discard(storage, link)


def remove_step(storage: Storage, root: Path, step: int) -> bool:
    """Remove the checkpoint of a step; False if it stays, a failure is logged only."""
    folder = step_folder(root, step)
    going = folder.with_name(folder.name + REMOVED)
    discard(storage, going)
    try:
        # under another name first: a half-removed checkpoint is never seen
        storage.rename(folder, going)
        storage.sync_dir(root)
    except OSError as error:
        logger.warning("cannot remove the old checkpoint %s: %s", folder, error)
        return False
    discard(storage, going)
    return True


class Rotation:
    """Keeps the newest `keep` valid checkpoints; None keeps all. Invalid ones neither count nor go."""

    def __init__(self, storage: Storage, root: Path, keep: int | None) -> None:
        self._storage = storage
        self._root = root
        self._keep = keep
        # looked at once; only manifest and sizes, as hashing everything at each save would cost too much
        self._valid: set[int] = set()

    def remove_old(self, committed: int) -> None:
        """Remove what is too old now that `committed` was written; that one always stays. A failure is logged only."""
        if self._keep is None:
            return
        self._valid.add(committed)
        steps = [step for step in stored_steps(self._root) if self._is_valid(step)]
        for step in steps[self._keep :]:
            if step != committed:
                self.forget(step)

    def forget(self, step: int) -> bool:
        """Remove the checkpoint of a step; False if it stays, a failure is logged only."""
        gone = remove_step(self._storage, self._root, step)
        if gone:
            self._valid.discard(step)
        return gone

    def _is_valid(self, step: int) -> bool:
        if step not in self._valid:
            try:
                look(step_folder(self._root, step), step)
            except CheckpointError:
                return False
            self._valid.add(step)
        return True
