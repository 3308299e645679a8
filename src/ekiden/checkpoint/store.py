"""The checkpoints of a run: written so that a finished one is whole, found by verifying, bounded in number and bytes.

`training.loop` saves and resumes through here. A save goes into a temporary folder beside its final name, every file
fsynced and hashed, the manifest last; the rename is the commit. Nothing is ever written into a finished folder, and
nothing is trusted by its name, date or a pointer file: only by its hashes. Only when the new checkpoint is durable
may an old one go.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ekiden.checkpoint import files
from ekiden.checkpoint.manifest import NAME, Damaged, FileRecord, Hashes, Manifest, read_manifest, verify_folder
from ekiden.checkpoint.tensors import read_tensors, write_tensors
from ekiden.errors import UserError
from ekiden.progress import human_duration, say

_STEP = re.compile(r"step-\d{8,}")
_TEMPORARY, _TRASH, _DAMAGED = ".tmp-", ".trash-", ".damaged-"


class CheckpointError(Exception):
    """A checkpoint could not be written; the older ones are as they were."""


class CheckpointWriter:
    """The files of one checkpoint, as they are written into its temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, FileRecord] = {}

    def tensors(
        self, filename: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """Write tensors as a safetensors file."""
        self.records[filename] = write_tensors(self.folder / filename, tensors, metadata)

    def json(self, filename: str, value: Any) -> None:
        """Write a JSON file."""
        self.bytes(filename, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def bytes(self, filename: str, data: bytes) -> None:
        """Write a file."""
        hashes = Hashes()
        hashes.update(data)
        with files.DurableFile(self.folder / filename) as file:
            file.write(data)
        self.records[filename] = hashes.record()


Write = Callable[[CheckpointWriter], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been verified."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Verify the checkpoint in `path` and return it.

        Raises:
            UserError: it is damaged, or not a checkpoint.
        """
        try:
            return cls(path, verify_folder(path))
        except Damaged as damage:
            raise UserError(f"{path} is not a good checkpoint: {damage}; choose another, or --resume-from auto") from None

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.manifest.step

    def tensors(self, filename: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one of its files."""
        return read_tensors(self.path / filename)

    def json(self, filename: str) -> Any:
        """Return the value of one of its JSON files."""
        return json.loads((self.path / filename).read_bytes())


@dataclass(frozen=True)
class CheckpointStatus:
    """One row of `ekiden checkpoint list`: `problem` is None where every byte verified."""

    name: str
    step: int | None
    bytes: int
    age_seconds: float
    run: dict[str, Any]
    problem: str | None


class CheckpointStore:
    """The folder `RUN/checkpoints`.

    Args:
        keep: newest checkpoints kept; at least 2, since the newest may be damaged by the very next fault.
        budget_bytes: bytes that the kept ones may take together; None: 90 % of the disk that is free or theirs.
    """

    def __init__(self, folder: Path, keep: int = 4, budget_bytes: int | None = None) -> None:
        assert keep >= 2
        self.folder, self.keep, self.budget_bytes = folder, keep, budget_bytes
        if not folder.is_dir():
            folder.mkdir(parents=True)
            files.sync_folder(folder.parent)
        for path in folder.iterdir():
            if path.name.startswith((_TEMPORARY, _TRASH)):
                files.remove_tree(path)

    def save(self, step: int, write: Write, run: dict[str, Any] | None = None) -> Checkpoint:
        """Write the checkpoint of `step`, durably, then remove what is no longer kept.

        Args:
            write: writes its files.
            run: facts kept in the manifest.

        Raises:
            CheckpointError: the disk is full or fails; no older checkpoint was touched, except that the oldest of
                more than two may have been given up for space.
        """
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            with contextlib.suppress(Damaged):
                return Checkpoint(target, verify_folder(target))
            self._set_aside(target)
        needed = max((status.total_bytes for _path, status in self._finished()), default=0)
        if needed > files.free_bytes(self.folder):
            self._give_up_oldest()
        try:
            checkpoint = self._write(target, step, write, run or {})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._give_up_oldest():
                raise CheckpointError(f"step {step}: {error.strerror or error}") from error
            try:
                checkpoint = self._write(target, step, write, run or {})
            except OSError as second:
                raise CheckpointError(f"step {step}: {second.strerror or second}") from second
        self._retain(checkpoint)
        return checkpoint

    def _write(self, target: Path, step: int, write: Write, run: dict[str, Any]) -> Checkpoint:
        temporary = self.folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
        files.remove_tree(temporary)
        try:
            manifest = write_folder(temporary, write, step, run)
            files.rename(temporary, target)
            files.sync_folder(self.folder)
        except OSError:
            # After a failed fsync of the parent the rename may or may not last; either way it is a whole checkpoint.
            with contextlib.suppress(OSError):
                files.remove_tree(temporary)
            raise
        return Checkpoint(target, manifest)

    def _finished(self) -> list[tuple[Path, Manifest]]:
        """Return the finished checkpoints, oldest first, by the step in their manifests; not verified."""
        found = []
        for path in self.folder.iterdir():
            if _STEP.fullmatch(path.name):
                with contextlib.suppress(Damaged):
                    found.append((path, read_manifest(path)))
        return sorted(found, key=lambda item: item[1].step)

    def _retain(self, newest: Checkpoint) -> None:
        """Remove the oldest checkpoints beyond `keep` and the byte budget; never below two, never the new one."""
        finished = self._finished()
        total = sum(manifest.total_bytes for _path, manifest in finished)
        budget = self.budget_bytes or int(0.9 * (files.free_bytes(self.folder) + total))
        for path, manifest in finished[:-2]:
            if len(finished) <= self.keep and total <= budget:
                break
            if path == newest.path:
                continue
            try:
                self._remove(path)
            except OSError as error:
                say(f"{path.name} could not be removed ({error.strerror or error}); it will be tried again")
                break
            finished.remove((path, manifest))
            total -= manifest.total_bytes

    def _give_up_oldest(self) -> bool:
        """Remove the oldest checkpoint where a newer verified one stays; return whether one was removed."""
        finished = self._finished()
        if len(finished) < 2:
            return False
        try:
            verify_folder(finished[-1][0])
            self._remove(finished[0][0])
        except (Damaged, OSError):
            return False
        say(f"the disk is full: gave up {finished[0][0].name}, {finished[-1][0].name} stays")
        return True

    def _remove(self, path: Path) -> None:
        trash = self.folder / f"{_TRASH}{path.name}-{os.getpid()}"
        files.rename(path, trash)
        files.sync_folder(self.folder)
        files.remove_tree(trash)

    def _set_aside(self, path: Path) -> None:
        """Rename a damaged checkpoint so that it is kept for inspection but never found again."""
        count = sum(1 for other in self.folder.iterdir() if other.name.startswith(_DAMAGED))
        with contextlib.suppress(OSError):
            files.rename(path, self.folder / f"{_DAMAGED}{path.name}-{count}")
            files.sync_folder(self.folder)

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies, or None where there was never one.

        Damaged ones are said and set aside.

        Raises:
            UserError: there are checkpoints and none is good: that never becomes a fresh start.
        """
        problems = []
        for path in sorted(self.folder.iterdir(), key=lambda p: _claimed_step(p), reverse=True):
            if not _STEP.fullmatch(path.name):
                continue
            try:
                manifest = verify_folder(path)
            except Damaged as damage:
                say(f"{path.name} is damaged and was passed over: {damage}")
                problems.append(f"{path.name}: {damage}")
                self._set_aside(path)
                continue
            return Checkpoint(path, manifest)
        earlier = [path.name for path in self.folder.iterdir() if path.name.startswith(_DAMAGED)]
        if problems or earlier:
            reason = problems[0] if problems else f"{earlier[0]} was set aside before"
            raise UserError(
                f"no good checkpoint is left in {self.folder} ({reason}); restore one from a copy, or give another "
                "--output-dir to start afresh"
            )
        return None

    def list(self) -> list[CheckpointStatus]:
        """Verify every checkpoint, newest first, changing nothing."""
        return [
            inspect_checkpoint(path)
            for path in sorted(self.folder.iterdir(), key=lambda p: _claimed_step(p), reverse=True)
            if _STEP.fullmatch(path.name) or path.name.startswith(_DAMAGED)
        ]


def _claimed_step(path: Path) -> int:
    """Return the step that a folder claims: its manifest's, else its name's, else -1."""
    with contextlib.suppress(Damaged):
        return read_manifest(path).step
    match = re.search(r"\d+", path.name)
    return int(match[0]) if match else -1


def inspect_checkpoint(path: Path) -> CheckpointStatus:
    """Return what is known of the checkpoint in `path`, every byte verified."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    age = time.time() - path.stat().st_mtime
    try:
        manifest = verify_folder(path)
    except Damaged as damage:
        return CheckpointStatus(path.name, None, size, age, {}, str(damage))
    return CheckpointStatus(path.name, manifest.step, size, age, manifest.run, None)


def format_statuses(run: Path) -> tuple[str, bool]:
    """Return the table of the checkpoints of run directory `run`, and whether one is good.

    Raises:
        UserError: there is no such run directory.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} holds no checkpoints; give a run directory, the --output-dir of `ekiden train`")
    rows = ["step        tokens        MB       age      state"]
    statuses = CheckpointStore.__new__(CheckpointStore)
    statuses.folder = folder
    good = False
    for status in statuses.list():
        good |= status.problem is None
        step = status.name if status.step is None else f"{status.step:<10d}"
        rows.append(
            f"{step}  {status.run.get('tokens', '-')!s:<12}  {status.bytes / 1e6:<7.1f}  "
            f"{human_duration(status.age_seconds):<7}  {'verified' if status.problem is None else 'damaged: ' + status.problem}"
        )
    return "\n".join(rows if len(rows) > 1 else ["there are no checkpoints"]), good


def write_folder(folder: Path, write: Write, step: int, run: dict[str, Any]) -> Manifest:
    """Write a new folder with its manifest last, all of it durable, not yet under its final name."""
    files.make_folder(folder)
    writer = CheckpointWriter(folder)
    write(writer)
    manifest = Manifest(step, writer.records, run)
    with files.DurableFile(folder / NAME) as file:
        file.write(manifest.to_json())
    files.sync_folder(folder)
    return manifest


def replace_folder(target: Path, write: Write, run: dict[str, Any]) -> None:
    """Write `target` anew, whole, in place of the folder of that name.

    The old one is renamed away only when the new one is durable; `recover_folder` puts it back where a power cut
    fell between the two renames.

    Raises:
        OSError: the disk is full or fails; the old folder is as it was.
    """
    temporary, old = (target.with_name(f".{kind}-{target.name}") for kind in ("new", "old"))
    recover_folder(target)
    files.remove_tree(temporary)
    try:
        write_folder(temporary, write, int(run.get("step", 0)), run)
        if target.exists():
            files.rename(target, old)
        files.rename(temporary, target)
        files.sync_folder(target.parent)
    except OSError:
        with contextlib.suppress(OSError):
            recover_folder(target)
            files.remove_tree(temporary)
        raise
    files.remove_tree(old)


def recover_folder(target: Path) -> None:
    """Finish or undo a replacement of `target` that was cut short."""
    old = target.with_name(f".old-{target.name}")
    if old.exists() and not target.exists():
        files.rename(old, target)
        files.sync_folder(target.parent)
    elif old.exists():
        files.remove_tree(old)
