"""Loading: all ranks agree on the newest whole checkpoint, then each reads the rectangles that it needs."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_moe.checkpoint.accounting import Account, Demand
from megatron_moe.checkpoint.beside import HashesBeside
from megatron_moe.checkpoint.commit import twin_experts
from megatron_moe.checkpoint.fill import fill_blocks
from megatron_moe.checkpoint.manifest import Manifest, StoredTensor, parse_manifest
from megatron_moe.checkpoint.messages import any_says, gather_to_all, gather_to_first, raise_together, told_by_first
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.checkpoint.rotate import step_folder, stored_steps
from megatron_moe.checkpoint.tensor_file import DTYPES
from megatron_moe.checkpoint.verify import Check, Papers, check_share, check_unread, look
from megatron_moe.config.errors import CheckpointError, NoCheckpointError
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.state import Axis

# "refuse" a checkpoint that holds more than the model, or only "name" what is left over
Unused = Literal["refuse", "name"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examined:
    """A checkpoint that is whole; the same on all ranks."""

    folder: Path
    manifest: Manifest
    papers: Papers


def examine(folder: Path, step: int, world: Axis, device: torch.device, check: Check) -> Examined | str:
    """The checkpoint in a folder, or why it cannot be used. Collective: the same answer on all ranks.

    The first rank reads the small files and tells their text; hashing is shared out over the ranks.
    """
    told: dict[str, Any] = {}
    if world.is_first:
        try:
            manifest, papers = look(folder, step)
            told = {"papers": vars(papers)}
        except (CheckpointError, ValueError) as error:
            told = {"problem": str(error)}
    told = json.loads(told_by_first(json.dumps(told), world, device))
    if "problem" in told:
        return str(told["problem"])
    if not world.is_first:
        papers = Papers(**told["papers"])
        manifest = parse_manifest(papers.manifest.encode())
    problems = gather_to_all(check_share(folder, manifest, world.rank, world.size, check), world, device)
    found = [text for text in problems if text]
    return "; ".join(found[:3]) if found else Examined(folder, manifest, papers)


def all_stored_steps(root: Path, world: Axis, device: torch.device) -> list[int]:
    """`stored_steps` as the first rank sees them. Collective."""
    mine = json.dumps(stored_steps(root)) if world.is_first else ""
    return list(json.loads(told_by_first(mine, world, device)))


def find_checkpoint(
    root: Path,
    step: int | None,
    world: Axis,
    *,
    strict: bool = False,
    check: Check = "xxh3",
    device: torch.device | None = None,
    damaged: Mapping[int, str] | None = None,
    at_most: int | None = None,
) -> "CheckpointReader":
    """The newest checkpoint that is whole, or that of `step`. Collective.

    Broken ones are passed over, with one message that says why. strict, or a step: CheckpointError instead.
    check: with "on_read" all bytes are read once, not twice: what is filled is verified as it is read, and `fill` and
    `fill_all` raise DamagedError when it is not what was stored. The caller then asks for another one, and lets the
    one that proves whole tell of those that were passed over (`tell_passed_over`).
    damaged: steps that were found so, and why; they are not looked at.
    at_most: later steps are no candidates.
    Raises NoCheckpointError when there is none.
    """
    place = device or torch.device("cpu")
    steps = all_stored_steps(root, world, place)
    if at_most is not None:
        steps = [found for found in steps if found <= at_most]
    wanted = steps if step is None else [found for found in steps if found == step]
    broken: list[str] = []
    for candidate in wanted:
        known = (damaged or {}).get(candidate)
        found = known or examine(step_folder(root, candidate), candidate, world, place, check)
        if isinstance(found, Examined):
            reader = CheckpointReader(found, world, place, on_read=check == "on_read", passed_over=broken)
            if check != "on_read":
                reader.tell_passed_over()
            return reader
        broken.append(f"  step {candidate}: {found}")
        if strict or step is not None:
            raise CheckpointError(
                f"The checkpoint of step {candidate} in {root} is broken and no other may be used:\n{broken[0]}\n"
                f"Name another step, or let older ones be used."
            )
    raise NoCheckpointError(_nothing(root, step, steps, broken))


def _nothing(root: Path, step: int | None, steps: Sequence[int], broken: Sequence[str]) -> str:
    if broken:
        return f"No checkpoint in {root} is whole:\n" + "\n".join(broken[:10])
    if step is not None and steps:
        return f"There is no checkpoint of step {step} in {root}; there are: {', '.join(map(str, steps[:10]))}."
    return f"There is no checkpoint in {root} (folders step_XXXXXXXX with a MANIFEST.json); check the path."


class DamagedError(CheckpointError):
    """A file is not what was stored, or cannot be read: what was being filled is of no use; an older one may be."""


class CheckpointReader:
    """A whole checkpoint. tensors[part][name] has the dtype (safetensors' name), shape and slices of each tensor.

    on_read: only what it was found by is verified yet; `fill` and `fill_all` verify all slices of a part, also those
    that no block asks for. `logical` and `rectangle` verify nothing.
    """

    def __init__(
        self,
        found: Examined,
        world: Axis,
        device: torch.device,
        on_read: bool = False,
        passed_over: Sequence[str] = (),
    ) -> None:
        self.folder = found.folder
        self.manifest = found.manifest
        self.step = found.manifest.step
        self.run_id = found.manifest.run_id
        self.texts = found.papers.texts
        self.state: dict[str, Any] = json.loads(self.texts["state.json"])
        self.config_json = self.texts["config.json"]
        self.data: dict[str, Any] = json.loads(self.texts["data.json"])
        self._world = world
        self._device = device
        self._on_read = on_read
        self._passed_over = passed_over

    def tell_passed_over(self) -> None:
        """Log, in one message of the first rank, which newer checkpoints are broken and why; nothing if none is."""
        if self._passed_over and self._world.is_first:
            why = "\n".join(self._passed_over)
            text = "Going on from step %d in %s; newer checkpoints are broken:\n%s"
            logger.warning(text, self.step, self.folder.parent, why)

    @property
    def tensors(self) -> dict[str, dict[str, StoredTensor]]:
        return self.manifest.parts

    def names(self, part: str) -> list[str]:
        """Logical tensors of a part; empty when it was not saved."""
        return list(self.tensors.get(part, {}))

    def fill(self, blocks: Sequence[Block], part: str = "model", *, cast: bool = False) -> None:
        """Fill each block in place, whatever the split it was saved in. Collective over the world.

        The blocks may be some of a part.  cast: convert between floating-point types where they differ.  Raises
        CheckpointError on all ranks if a tensor is missing, has another shape or type, or cannot be read.
        """
        self._compare(blocks, part, cast, whole=False, unused="name")
        self._read(blocks, part)

    def fill_all(
        self, blocks: Sequence[Block], part: str = "model", *, cast: bool = False, unused: Unused = "refuse"
    ) -> list[str]:
        """`fill` for all of a part: the ranks' primary blocks hold each element once, and nothing stored is left over.

        unused: what becomes of stored tensors that no rank asks for; their names are returned. Experts of a layer that
        the model has are never left over.  Raises CheckpointError on all ranks, listing every difference.
        """
        spare = self._compare(blocks, part, cast, whole=True, unused=unused)
        if part == "model" and self._world.is_first:
            for twin, first in twin_experts(self.tensors.get(part, {}))[:5]:
                logger.warning("step %d: experts %s and %s hold the same numbers", self.step, first, twin)
        self._read(blocks, part)
        return spare

    def _compare(self, blocks: Sequence[Block], part: str, cast: bool, *, whole: bool, unused: Unused) -> list[str]:
        """The first rank draws up the account of all; returns the names that nobody asks for."""
        stored = self.tensors.get(part, {})
        texts = gather_to_first(Demand.of(blocks, stored, cast).to_text(), self._world, self._device)
        told: dict[str, Any] = {}
        if self._world.is_first:
            account = Account.of([Demand.from_text(text) for text in texts], stored, whole=whole)
            refused = account.unused if unused == "refuse" else account.lost_experts
            problem = account.explain(refused if whole else [])
            # what is left over explains what is missing
            told = {"problem": problem and account.explain(account.unused), "unused": account.unused}
        told = json.loads(told_by_first(json.dumps(told), self._world, self._device))
        if told["problem"]:
            raise CheckpointError(
                f"{self.folder} does not fit this model ({part}):\n{told['problem']}\n"
                f"Give the model the options in this checkpoint's config.json, or load another checkpoint."
            )
        return list(told["unused"])

    def _read(self, blocks: Sequence[Block], part: str) -> None:
        """Fill, and verify all slices of the tensors that a rank asks for, if that was left for now."""
        problem, stored = "", self.tensors.get(part, {})
        with HashesBeside() as hashes:
            try:
                fill_blocks(self.folder, self.manifest, stored, blocks, hashes if self._on_read else None)
                problem = "; ".join(hashes.problems()[:3])
            except CheckpointError as error:
                problem = str(error)
        raise_together(problem, self._world, self._device, DamagedError)
        if self._on_read:
            self._check_rest(part, hashes.checked)

    def _check_rest(self, part: str, checked: Set[tuple[str, int]]) -> None:
        """What blocks of another split ask for in pieces, or nobody asks for, shared out over the ranks."""
        slices = [(name, piece) for name, tensor in self.tensors.get(part, {}).items() for piece in tensor.slices]
        mine = [(piece.file, piece.start) in checked for _, piece in slices]
        done = any_says(mine, self._world, self._device)
        rest = [entry for entry, was_read in zip(slices, done, strict=True) if not was_read]
        problem = check_unread(self.folder, self.manifest, rest, self._world.rank, self._world.size)
        raise_together(problem, self._world, self._device, DamagedError)

    def unused(self, names: Iterable[str], part: str = "model") -> list[str]:
        """Stored tensors that no rank names. Collective."""
        mine = sorted(set(names) & set(self.names(part)))
        told = gather_to_all(json.dumps(mine), self._world, self._device)
        wanted = {name for text in told for name in json.loads(text)}
        return [name for name in self.names(part) if name not in wanted]

    def logical(self, name: str, part: str = "model") -> Tensor:
        """One whole tensor on the CPU, read now; not collective. CheckpointError if it is not there."""
        stored = self.tensors.get(part, {})
        if name not in stored:
            raise CheckpointError(f"step {self.step} in {self.folder.parent} has no {part} tensor '{name}'")
        return self.rectangle(name, Rectangle.whole(stored[name].shape), part)

    def rectangle(self, name: str, wanted: Rectangle, part: str = "model") -> Tensor:
        """A part of a tensor that is there, on the CPU, read now; not collective."""
        stored = self.tensors[part]
        found = torch.empty(wanted.shape, dtype=DTYPES[stored[name].dtype])
        block = Block(name, stored[name].shape, wanted.offset, found, primary=True)
        fill_blocks(self.folder, self.manifest, stored, [block])
        return found
