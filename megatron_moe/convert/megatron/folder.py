"""Which checkpoint of a Megatron folder is meant, in what format it is, and which of its files are pickles.

    DIR/latest_checkpointed_iteration.txt   a number, or the word release
    DIR/iter_0000100/metadata.json  common.pt  .metadata  __0_0.distcp ...     format torch_dist
    DIR/iter_0000100/mp_rank_00_001_002/model_optim_rng.pt ...                 format torch: tp, then pp, then ep

Nothing here opens a pickle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.errors import CheckpointError, NoCheckpointError
from megatron_moe.convert.hf_folder import read_json

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
RELEASE = "release"
# a number of iterations has no more digits
TRACKER_LIMIT_BYTES = 64


@dataclass(frozen=True)
class Iteration:
    """One checkpoint. kind: "torch_dist" or "torch".  pickles: files that can run code when opened, sorted."""

    folder: Path
    kind: str
    pickles: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Of all its pickles."""
        return sum(path.stat().st_size for path in self.pickles)

    @property
    def largest(self) -> int:
        """Bytes of the largest of its pickles."""
        return max(path.stat().st_size for path in self.pickles)


def find_iteration(folder: Path, iteration: int | None = None) -> Iteration:
    """The checkpoint of `iteration` in `folder`; None: the one that the tracker names, or `folder` itself is one.

    Raises NoCheckpointError if there is none, CheckpointError for an empty or broken tracker and for a format that is
    not read here.
    """
    if not folder.is_dir():
        raise NoCheckpointError(f"--megatron-folder {folder}: there is no such folder; give the one with {TRACKER}.")
    if iteration is None and not (folder / TRACKER).exists() and _kind(folder) is not None:
        return iteration_at(folder)
    name = tracked_name(folder) if iteration is None else f"iter_{iteration:07d}"
    if not (folder / name).is_dir():
        said = f"--iteration {iteration}" if iteration is not None else f"{folder / TRACKER}"
        found = ", ".join(_iterations(folder)) or "none"
        raise NoCheckpointError(f"{said} asks for {folder / name}, which does not exist; there: {found}.")
    return iteration_at(folder / name)


def tracked_name(folder: Path) -> str:
    """The folder that the tracker file names. NoCheckpointError without one, CheckpointError for a broken one."""
    path = folder / TRACKER
    found = ", ".join(_iterations(folder)) or "none"
    help_ = f"give --iteration N for one of the checkpoints that are there ({found})"
    try:
        with path.open("rb") as file:
            text = file.read(TRACKER_LIMIT_BYTES)
    except FileNotFoundError:
        raise NoCheckpointError(f"there is no {path}, which names the newest checkpoint; {help_}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {help_}.") from error
    word = text.decode("ascii", "replace").strip()
    if not word:
        raise CheckpointError(
            f"{path} is empty: a save was cut off between emptying it and writing the number. The newest folder may "
            f"be incomplete; {help_}."
        )
    if word == RELEASE:
        return RELEASE
    if not re.fullmatch(r"[0-9]{1,18}", word):
        raise CheckpointError(f"{path} holds {word!r}, expected a number of iterations or '{RELEASE}'; {help_}.")
    return f"iter_{int(word):07d}"


def _iterations(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(name for name in names if name == RELEASE or re.fullmatch(r"iter_\d{7,}", name))


def _kind(folder: Path) -> str | None:
    if (folder / "metadata.json").is_file():
        backend = read_json(folder / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise CheckpointError(
                f"{folder / 'metadata.json'}: sharded_backend is {backend!r}, but only 'torch_dist' is read; convert "
                f"with Megatron-LM's --ckpt-convert-format torch_dist first."
            )
        return "torch_dist"
    return "torch" if any(RANK_FOLDER.fullmatch(path.name) for path in folder.iterdir()) else None


def iteration_at(folder: Path) -> Iteration:
    """The checkpoint that lies in `folder` itself. CheckpointError if it is incomplete or in another format."""
    kind = _kind(folder)
    if kind == "torch_dist":
        needed = [folder / "common.pt", folder / ".metadata"]
        for path in needed:
            if not path.is_file():
                raise CheckpointError(f"{folder} lacks {path.name}, so its save was cut off; give another --iteration.")
        return Iteration(folder, kind, tuple(sorted([*needed, *folder.glob("*.distcp")])))
    if kind == "torch":
        ranks = [path for path in folder.iterdir() if RANK_FOLDER.fullmatch(path.name)]
        for path in ranks:
            if not (path / RANK_FILE).is_file():
                raise CheckpointError(f"{path} lacks {RANK_FILE}, so its save was cut off; give another --iteration.")
        return Iteration(folder, kind, tuple(sorted(path / RANK_FILE for path in ranks)))
    raise CheckpointError(
        f"{folder} has neither metadata.json (format torch_dist) nor mp_rank_ folders (format torch); formats "
        f"fsdp_dtensor and torch_dcp are not read."
    )
