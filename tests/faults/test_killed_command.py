"""SIGKILL to a command that writes: nothing half-done is to be seen, and the same command again does its work."""

import json
import os
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from goals import Trials

from megatron_moe.checkpoint.catalogue import open_place
from megatron_moe.checkpoint.compare import differences
from megatron_moe.checkpoint.load import Examined, examine
from megatron_moe.checkpoint.manifest import MANIFEST
from megatron_moe.checkpoint.rotate import step_folder, stored_steps
from megatron_moe.convert.export import ExportOptions, export_model
from tests.checkpoint.samples import ALONE, assert_holds_sample, files_of, newest, save_sample
from tests.convert.samples import MemorySource, mapping_of, random_weights, run_of
from tests.end_to_end.tiny_job import CPU
from tests.faults.leaks import Held, leaked, left_by_saves
from tests.faults.mortal import DONE, FAILED, KILLED, in_child
from tools import checkpoint, convert_checkpoint, preprocess_data

HELD_ALREADY = 2  # exit code: what was asked for is there, and is not overwritten


class Command(ABC):
    """A command whose output lies in one folder."""

    def __init__(self, source: Path) -> None:
        self.source = source

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """What is there before."""

    @abstractmethod
    def run(self, folder: Path) -> int:
        """The command; returns its exit code."""

    @abstractmethod
    def is_there(self, folder: Path) -> bool:
        """Whether the output can be seen; AssertionError if a part of it can."""

    def run_again(self, folder: Path) -> int:
        return self.run(folder)

    def check(self, folder: Path) -> None:
        """After the command has been run again."""
        assert self.is_there(folder)


class Reshard(Command):
    def __init__(self, source: Path) -> None:
        super().__init__(source)
        save_sample(source / "from", 7)

    def prepare(self, folder: Path) -> None:
        folder.mkdir()

    def run(self, folder: Path) -> int:
        return checkpoint.main(["reshard", str(self.source / "from"), str(folder / "to"), "--ranks", "2"])

    def is_there(self, folder: Path) -> bool:
        if not stored_steps(folder / "to"):
            return False
        found = open_place(folder / "to")
        assert_holds_sample(found)
        return not list(differences(open_place(self.source / "from"), found))

    def check(self, folder: Path) -> None:
        super().check(folder)
        assert [name for name in left_by_saves(folder / "to") if not name.startswith("latest")] == []


class Prune(Command):
    def __init__(self, source: Path) -> None:
        super().__init__(source)
        for step in (10, 20, 30, 40):
            save_sample(source, step)

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.source, folder, symlinks=True)

    def run(self, folder: Path) -> int:
        return checkpoint.main(["prune", str(folder), "--keep", "2"])

    def is_there(self, folder: Path) -> bool:
        steps = stored_steps(folder)
        for step in steps:
            assert isinstance(examine(step_folder(folder, step), step, ALONE, CPU, "xxh3"), Examined)
        assert steps[:2] == [40, 30]
        assert_holds_sample(newest(folder))
        return steps == [40, 30]

    def check(self, folder: Path) -> None:
        super().check(folder)
        assert left_by_saves(folder) == []


class Rotate(Command):
    """A save after which the link `latest` moves on and the oldest checkpoint goes."""

    STEPS, SAVED, KEEP = (10, 20), 30, 2

    def __init__(self, source: Path) -> None:
        super().__init__(source)
        for step in self.STEPS:
            save_sample(source, step)

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.source, folder, symlinks=True)

    def run(self, folder: Path) -> int:
        save_sample(folder, self.SAVED, keep=self.KEEP).finish()
        return 0

    def is_there(self, folder: Path) -> bool:
        found = newest(folder)
        assert_holds_sample(found)
        assert found.step in (self.SAVED, self.STEPS[-1]) and len(self._whole(folder)) >= self.KEEP
        return found.step == self.SAVED

    def _whole(self, folder: Path) -> list[int]:
        looks = {step: examine(step_folder(folder, step), step, ALONE, CPU, "xxh3") for step in stored_steps(folder)}
        return [step for step, look in looks.items() if isinstance(look, Examined)]

    def run_again(self, folder: Path) -> int:
        # the next save is that of a further step: one that is there is left alone, and nothing follows it
        save_sample(folder, self.SAVED, keep=self.KEEP).finish()
        save_sample(folder, self.SAVED + 10, keep=self.KEEP).finish()
        return 0

    def check(self, folder: Path) -> None:
        assert stored_steps(folder) == self._whole(folder) == [self.SAVED + 10, self.SAVED]
        assert left_by_saves(folder) == []
        assert os.readlink(folder / "latest") == step_folder(folder, self.SAVED + 10).name


class SaveOver(Rotate):
    """The same over what failed attempts have left, and in place of a broken checkpoint of that step."""

    def __init__(self, source: Path) -> None:
        super().__init__(source)
        save_sample(source, self.SAVED)
        broken = step_folder(source, self.SAVED)
        (broken / MANIFEST).unlink()
        for left in (".tmp-run-1", ".tmp-other-3", ".tmp-removed"):
            shutil.copytree(broken, broken.with_name(broken.name + left))
        (source / "latest.tmp-run").symlink_to(broken.name)


class Export(Command):
    def __init__(self, source: Path) -> None:
        super().__init__(source)
        run, family = run_of("mixtral"), "mixtral"
        weights = MemorySource(random_weights(mapping_of(family, run), torch.float32))
        options = ExportOptions(model_type=family, with_tokenizer=False)
        export_model(weights, run, source / "theirs", options=options, where="test")
        arguments = ["import", "--hf-folder", str(source / "theirs"), "--save", str(source / "saved")]
        assert convert_checkpoint.main(arguments) == 0
        self._export(source / "wanted")
        self._wanted = files_of(source / "wanted")
        assert len(self._wanted) > 3

    def _export(self, output: Path) -> int:
        words = ["export", "--load", str(self.source / "saved"), "--output", str(output), "--no-tokenizer"]
        return convert_checkpoint.main([*words, "--max-shard-size", "60KB"])

    def prepare(self, folder: Path) -> None:
        folder.mkdir()

    def run(self, folder: Path) -> int:
        return self._export(folder / "out")

    def is_there(self, folder: Path) -> bool:
        if not (folder / "out").exists():
            return False
        assert files_of(folder / "out") == self._wanted
        return True

    def check(self, folder: Path) -> None:
        super().check(folder)
        assert [path.name for path in folder.iterdir()] == ["out"]


class Preprocess(Command):
    """overwrites: there is an older pair of the same name."""

    def __init__(self, source: Path, overwrites: bool = False) -> None:
        super().__init__(source)
        self._overwrites = overwrites
        for name, seed in (("new", 1), ("old", 2)):
            rng = random.Random(seed)
            lines = [json.dumps({"text": "ab " * rng.randrange(1, 50)}) for _ in range(40)]
            (source / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
            (source / name).mkdir()
            assert self._make(name, source / name) == 0
        self._known = {name: files_of(source / name) for name in ("new", "old")}

    def _make(self, name: str, folder: Path, *more: str) -> int:
        words = ["--input", str(self.source / f"{name}.jsonl"), "--output-prefix", str(folder / "out")]
        return preprocess_data.main([*words, "--tokenizer-type", "ByteTokenizer", "--append-eod", *more])

    def prepare(self, folder: Path) -> None:
        if self._overwrites:
            shutil.copytree(self.source / "old", folder)
        else:
            folder.mkdir()

    def run(self, folder: Path) -> int:
        return self._make("new", folder, *(["--overwrite"] if self._overwrites else []))

    def is_there(self, folder: Path) -> bool:
        found = files_of(folder)
        if "out_text_document.idx" not in found:
            return False
        pair = {name: data for name, data in found.items() if not name.endswith(".partial")}
        return self._is(pair, "new") or not (self._overwrites and self._is(pair, "old"))

    def _is(self, pair: Mapping[str, bytes], name: str) -> bool:
        return dict(pair) == self._known[name]

    def check(self, folder: Path) -> None:
        assert files_of(folder) == self._known["new"]


class Overwrite(Preprocess):
    def __init__(self, source: Path) -> None:
        super().__init__(source, overwrites=True)


COMMANDS = {
    "reshard": Reshard,
    "prune": Prune,
    "rotation and the swap of the link": Rotate,
    "a save over leftovers and a broken checkpoint": SaveOver,
    "HF export": Export,
    "preprocessing": Preprocess,
    "preprocessing over an older pair": Overwrite,
}


def marked(name: str) -> object:
    ci = 50 if name.startswith("preprocessing") else 100
    what = f"SIGKILL during {name}: nothing half-visible, the command again succeeds"
    return pytest.param(name, marks=pytest.mark.goal("R3", ci=ci, nightly=300, what=what))


@pytest.mark.parametrize("name", [marked(name) for name in COMMANDS])
@pytest.mark.timeout(7200)
def test_a_killed_command_is_done_by_starting_it_again(name: str, trials: Trials, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    command: Command = COMMANDS[name](tmp_path / "source")
    before = Held.now()
    changes, killed = count_changes(command, tmp_path), 0
    usual_s = 0.05
    for number, rng in trials:
        folder = tmp_path / "folder"
        command.prepare(folder)
        # before each change in turn, and at as many random times
        at = None if number % 2 else number // 2 % changes
        after = rng.uniform(0, usual_s) if at is None else None
        killed += kill(command, folder, after, at, tmp_path / "log") == KILLED
        seen = command.is_there(folder)
        code = run_in_child(command, folder, tmp_path)
        assert code == 0 or (seen and code == HELD_ALREADY), (number, at, code, (tmp_path / "log").read_text()[-2000:])
        command.check(folder)
        shutil.rmtree(folder)
    assert killed >= trials.done // 2
    assert leaked(before) == []


def kill(command: Command, folder: Path, after: float | None, at: int | None, log: Path) -> str:
    outcome = in_child(lambda: command.run(folder), after_s=after, at_change=at, under=folder, log=log)
    assert outcome != FAILED, log.read_text()[-2000:]
    return outcome


def run_in_child(command: Command, folder: Path, tmp_path: Path) -> int:
    """In a process of its own, as a person would start it; returns the exit code."""
    answer = tmp_path / "answer"

    def work() -> None:
        answer.write_text(str(command.run_again(folder)))

    assert in_child(work, under=folder, log=tmp_path / "log") == DONE, (tmp_path / "log").read_text()[-2000:]
    return int(answer.read_text())


def count_changes(command: Command, tmp_path: Path) -> int:
    """How many changes the command makes to its folder: kills before each, until there is none."""
    for number in range(1000):
        folder = tmp_path / "counted"
        command.prepare(folder)
        outcome = kill(command, folder, None, number, tmp_path / "log")
        shutil.rmtree(folder)
        if outcome == DONE:
            assert number > 3
            return number
    raise AssertionError("the command never ends")
