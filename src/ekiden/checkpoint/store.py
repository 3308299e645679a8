"""The checkpoints of a run: written so that a finished one is whole, found by verifying, bounded in number
and bytes.

`training.loop` saves and resumes through here. A save goes into a temporary folder beside its final name,
every file fsynced and hashed, the manifest last; the rename is the commit. Nothing is ever written into a
finished folder, and nothing is trusted by its name, date or a pointer file: only by its hashes. Only when the
new checkpoint is durable may an old one go.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.checkpoint.folder import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    Write,
    recover_folder,
    replace_folder,
    write_folder,
)
from ekiden.checkpoint.listing import (
    DAMAGED,
    CheckpointStatus,
    format_statuses,
    inspect_checkpoint,
    list_checkpoints,
    step_folders,
)
from ekiden.checkpoint.manifest import (
    Damaged,
    Manifest,
    Unreadable,
    extra_files,
    read_manifest,
    verify_folder,
)
from ekiden.errors import UserError
from ekiden.progress import say

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointStatus",
    "CheckpointStore",
    "CheckpointWriter",
    "Write",
    "format_statuses",
    "inspect_checkpoint",
    "recover_folder",
    "replace_folder",
    "write_folder",
]

_TEMPORARY, _TRASH = ".tmp-", ".trash-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointStore:
    """The folder `RUN/checkpoints`; one process writes to it (the run's lock sees to that), any number may
    read.

    Args:
        keep: newest verified checkpoints kept; at least 2, since the newest may be damaged by the very next
        fault. budget_bytes: bytes that the kept ones may take together; None: 90 % of the disk that is free
        or theirs.

    Attributes:
        protected: steps that are never removed, for instance while a mirror copies them.

    Raises:
        UserError: the folder is missing and cannot be created.
    """

    def __init__(self, folder: Path, keep: int = 4, budget_bytes: int | None = None) -> None:
        assert keep >= 2
        self.folder, self.keep, self.budget_bytes = folder, keep, budget_bytes
        self.protected: set[int] = set()
        # What this process wrote or verified; the others are verified once before they count as kept.
        self._verified: dict[Path, Manifest] = {}
        try:
            files.make_folders(folder)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be created: {files.reason(error)}; give another --output-dir"
            ) from None
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove what a killed save or deletion left; where it must stay, it is never taken for good."""
        with contextlib.suppress(OSError):
            for path in list(self.folder.iterdir()):
                if path.name.startswith((_TEMPORARY, _TRASH)):
                    files.remove_tree(path)

    # -- saving ----------------------------------------------------------------------------------------------

    def save(
        self, step: int, write: Write, run: dict[str, Any] | None = None, estimate_bytes: int | None = None
    ) -> Checkpoint:
        """Write the checkpoint of `step`, durably, then remove what is no longer kept.

        Where that step's checkpoint exists and verifies, it is kept and nothing is written.

        Args:
            write: writes its files; called a second time where the first met a full disk and space could be
            freed. run: facts kept in the manifest.
            estimate_bytes: space it will need; None: as much as the newest one has.

        Raises:
            CheckpointError: the disk is full or fails; no older checkpoint was touched, except that on a full
                disk the oldest may have been given up where a newer one verifies.
        """
        try:
            files.make_folders(self.folder)
            checkpoint = self._existing(step)
            if checkpoint is None:
                checkpoint = self._save(step, write, run or {}, estimate_bytes)
        except (OSError, MemoryError) as error:
            raise CheckpointError(f"step {step}: {files.reason(error)}") from error
        self._verified[checkpoint.path] = checkpoint.manifest
        self._retain(checkpoint)
        return checkpoint

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _existing(self, step: int) -> Checkpoint | None:
        """Return the checkpoint of `step` where there is a good one; a damaged one is set aside."""
        target = self._path(step)
        if not os.path.lexists(target):
            return None
        try:
            manifest = verify_folder(target)
        except Unreadable as damage:
            raise CheckpointError(f"step {step}: {target.name} exists, but {damage}") from None
        except Damaged as damage:
            say(f"{target.name} is damaged and is written anew: {damage}")
            self._set_aside(target)
            return None
        # Its rename may have been the last thing before a crash: not yet durable.
        files.sync_folder(self.folder)
        return Checkpoint(target, manifest)

    def _save(self, step: int, write: Write, run: dict[str, Any], estimate_bytes: int | None) -> Checkpoint:
        self._remove_leftovers()
        gave_up = self._make_room(step, estimate_bytes)
        try:
            return self._write(step, write, run)
        except OSError as error:
            if error.errno not in _FULL or gave_up or not self._give_up_oldest(self._path(step)):
                raise
        # Where only the last fsync had failed, it stands there already.
        return self._existing(step) or self._write(step, write, run)

    def _make_room(self, step: int, estimate_bytes: int | None) -> bool:
        """Return whether an old checkpoint was given up so that there is space for a new one.

        Raises:
            CheckpointError: there is none, and nothing is begun.
        """
        needed = estimate_bytes
        if needed is None:
            newest = next(iter(self._readable()), None)
            needed = newest[1].total_bytes if newest else 0
        if files.free_bytes(self.folder) >= needed:
            return False
        gave_up = self._give_up_oldest(self._path(step))
        free = files.free_bytes(self.folder)
        if free < needed:
            raise CheckpointError(
                f"step {step}: it needs {needed / 1e6:.1f} MB, "
                f"and the disk of {self.folder} has {free / 1e6:.1f} MB free"
            )
        return gave_up

    def _write(self, step: int, write: Write, run: dict[str, Any]) -> Checkpoint:
        target = self._path(step)
        temporary = self._free_name(_TEMPORARY, target.name)
        try:
            manifest = write_folder(temporary, write, step, run)
            files.rename(temporary, target)
            # Where this fails, the rename may last or not; what then stands there is a whole checkpoint all
            # the same.
            files.sync_folder(self.folder)
        except Exception:
            with contextlib.suppress(OSError):
                files.remove_tree(temporary)
            raise
        return Checkpoint(target, manifest)

    # -- retention -------------------------------------------------------------------------------------------

    def _readable(self) -> list[tuple[Path, Manifest]]:
        """Return the checkpoints whose manifest can be read, newest first; their files are not looked at."""
        found = []
        for path in step_folders(self.folder):
            with contextlib.suppress(Damaged):
                found.append((path, read_manifest(path)))
        return found

    def _good(self) -> list[tuple[Path, Manifest]]:
        """Return the checkpoints that verified in this process, now or before, newest first."""
        found = []
        for path in step_folders(self.folder):
            try:
                manifest = self._verified.get(path) or verify_folder(path)
            except Damaged as damage:
                self._pass_over(path, damage)
                continue
            self._verified[path] = manifest
            found.append((path, manifest))
        return found

    def _retain(self, newest: Checkpoint) -> None:
        """Remove the oldest checkpoints beyond `keep` and the budget; never below two, never the new one."""
        try:
            good = self._good()
            total = sum(manifest.total_bytes for _path, manifest in good)
            budget = self.budget_bytes
            if budget is None:
                budget = int(0.9 * (files.free_bytes(self.folder) + total))
            count = len(good)
            for path, manifest in reversed(good[2:]):
                if count <= self.keep and total <= budget:
                    break
                if path == newest.path or manifest.step in self.protected:
                    continue
                self._remove(path)
                count, total = count - 1, total - manifest.total_bytes
        except OSError as error:
            say(f"old checkpoints could not be removed ({files.reason(error)}); the next save tries again")

    def _give_up_oldest(self, new: Path) -> bool:
        """Remove the oldest checkpoint where a newer verified one, other than `new`, stays; return whether it did."""
        found = [
            (path, manifest) for path, manifest in self._readable() if manifest.step not in self.protected
        ]
        if not found:
            return False
        oldest = found[-1][0]
        for path in step_folders(self.folder):
            if path == oldest:
                return False
            if path == new:
                continue
            with contextlib.suppress(Damaged):
                verify_folder(path)
                break
        else:
            return False
        try:
            self._remove(oldest)
        except OSError:
            return False
        say(f"the disk is full: gave up {oldest.name}, {path.name} stays")
        return True

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint: its name first, durably, so that half of one is never found."""
        trash = self._free_name(_TRASH, path.name)
        files.rename(path, trash)
        self._verified.pop(path, None)
        files.sync_folder(self.folder)
        files.remove_tree(trash)

    def _free_name(self, prefix: str, name: str) -> Path:
        candidates = (self.folder / f"{prefix}{name}-{k}" for k in itertools.count())
        return next(path for path in candidates if not os.path.lexists(path))

    # -- finding ---------------------------------------------------------------------------------------------

    def _set_aside(self, path: Path) -> None:
        """Rename a damaged checkpoint so that it is kept for inspection but never found again."""
        self._verified.pop(path, None)
        files.rename(path, self._free_name(DAMAGED, path.name))
        files.sync_folder(self.folder)

    def _pass_over(self, path: Path, damage: Damaged) -> None:
        """Say why a checkpoint is not used, and set it aside unless its bytes may come back."""
        if isinstance(damage, Unreadable):
            say(f"{path.name} was passed over: {damage}")
            return
        say(f"{path.name} is damaged and was passed over: {damage}")
        # On a read-only disk it keeps its name, and is found damaged again the next time.
        with contextlib.suppress(OSError):
            self._set_aside(path)

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies, or None where there was never one.

        Damaged ones are said and set aside.

        Raises:
            UserError: there are checkpoints, or were before they were set aside, and none is good: that never
                becomes a fresh start.
        """
        try:
            problems = []
            for path in step_folders(self.folder):
                try:
                    manifest = verify_folder(path)
                except Damaged as damage:
                    problems.append(f"{path.name}: {damage}")
                    self._pass_over(path, damage)
                    continue
                self._verified[path] = manifest
                if extra := extra_files(path, manifest):
                    say(f"{path.name} also holds {', '.join(extra[:5])}, ignored: not in its manifest")
                return Checkpoint(path, manifest)
            aside = sorted(path.name for path in self.folder.iterdir() if path.name.startswith(DAMAGED))
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be read: {files.reason(error)}; mend that and start again"
            ) from None
        if not problems and not aside:
            return None
        reason = problems[0] if problems else f"{aside[0]} was set aside before"
        raise UserError(
            f"no good checkpoint is left in {self.folder} ({reason}); restore one from a copy, or give "
            "another --output-dir to start afresh"
        )

    def list(self) -> list[CheckpointStatus]:
        """Verify every checkpoint, newest first, changing nothing."""
        return list_checkpoints(self.folder)
