"""Faults for the checkpoint tests: fail, crash or kill at the n-th file operation; a disk that loses what was not synced."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ekiden.checkpoint import files
from ekiden.checkpoint.manifest import verify_folder
from ekiden.checkpoint.store import Checkpoint, CheckpointStore, CheckpointWriter

ERRNOS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}
READS = ("open", "read")


class Crash(BaseException):
    """The process ends here: every later file operation ends it again, so no clean-up runs."""


class Fault:
    """Counts file operations and does `act` at number `at` (from 1), once or from then on; 0: only counts."""

    def __init__(self, at: int = 0, act: Callable[[], None] | None = None, persistent: bool = False) -> None:
        self.at, self.act, self.persistent = at, act, persistent
        self.operations: list[tuple[str, str]] = []

    def __call__(self, operation: str, path: Path) -> None:
        self.operations.append((operation, path.name))
        count = len(self.operations)
        if self.act and (count == self.at or (self.persistent and count > self.at)):
            self.act()


def raising(error: str) -> Callable[[], None]:
    """Return an action that fails with the error of that name, or ends the 'process' for "crash"."""

    def act() -> None:
        if error == "crash":
            raise Crash
        raise OSError(ERRNOS[error], os.strerror(ERRNOS[error]))

    return act


def full_while(path: Path, operation: str = "write") -> Callable[[str, Path], None]:
    """Return a hook for a disk that is full as long as `path` stands."""

    def hook(seen: str, _path: Path) -> None:
        if seen == operation and path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    return hook


@contextmanager
def injected(hook: Callable[[str, Path], None]) -> Iterator[None]:
    """Let `hook` see every file operation inside the block."""
    before = files.fault_hook
    files.fault_hook = hook
    try:
        yield
    finally:
        files.fault_hook = before


def content(step: int) -> dict[str, torch.Tensor]:
    """Return the tensors that the tests save at `step`."""
    return {
        "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) + step,
        "flags": torch.tensor([step % 2 == 0, True]),
    }


def writer_of(step: int) -> Callable[[CheckpointWriter], None]:
    """Return a callback that writes a small checkpoint of `step`."""

    def write(writer: CheckpointWriter) -> None:
        writer.tensors("model.safetensors", content(step), {"format": "pt"})
        writer.json("trainer_state.json", {"step": step})

    return write


def save(store: CheckpointStore, step: int) -> Checkpoint:
    """Save the small checkpoint of `step`."""
    return store.save(step, writer_of(step), {"tokens": 1000 * step, "loss": 0.5 + step})


def folder_step(folder: Path) -> int:
    """Verify the folder to the last byte, compare its content with what was saved, and return its step."""
    return content_step(Checkpoint(folder, verify_folder(folder)))


def content_step(checkpoint: Checkpoint) -> int:
    """Read the checkpoint, compare its content with what was saved, and return its step."""
    step = checkpoint.step
    tensors = checkpoint.tensors("model.safetensors")
    assert tensors.keys() == content(step).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in content(step).items())
    assert checkpoint.json("trainer_state.json") == {"step": step}
    return step


def good_steps(store: CheckpointStore) -> list[int]:
    """Return the steps of the checkpoints that verify, newest first, their content compared."""
    return [folder_step(store.folder / s.name) for s in store.list() if s.problem is None]


class Platter:
    """What a disk would hold after a power cut: only the names and bytes that were synced.

    To be used as the hook; at each operation the effect of the one before it is taken over, then `check` is called.
    """

    def __init__(self, root: Path, check: Callable[[Platter], None]) -> None:
        self.root, self.check = root, check
        self.last: tuple[str, Path] | None = None
        self.identity: dict[int, int] = {}  # inode -> a number that is never used again
        self.used = 0
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        for path in [root, *sorted(root.rglob("*"))]:
            self._new(path)
        for path in [root, *sorted(root.rglob("*"))]:
            self._sync(path)

    def _new(self, path: Path) -> None:
        self.used += 1
        self.identity[path.lstat().st_ino] = self.used

    def _id(self, path: Path) -> int:
        return self.identity[path.lstat().st_ino]

    def _sync(self, path: Path) -> None:
        if path.is_dir():
            self.names[self._id(path)] = {
                entry.name: (self._id(entry), entry.is_dir()) for entry in path.iterdir()
            }
        else:
            self.bytes[self._id(path)] = path.read_bytes()

    def settle(self) -> None:
        """Take over the effect of the last operation."""
        if self.last is not None:
            operation, path = self.last
            if operation in ("create", "mkdir"):
                self._new(path)
            elif operation in ("fsync", "sync"):
                self._sync(path)
            self.last = None

    def __call__(self, operation: str, path: Path) -> None:
        self.settle()
        with injected(None):  # type: ignore[arg-type]
            self.check(self)
        self.last = (operation, path)

    def after_power_cut(self, target: Path, names_survive: bool) -> Path:
        """Write what is left into `target`: with the names as they stand now, or only those that were synced."""
        shutil.rmtree(target, ignore_errors=True)
        if names_survive:
            self._copy_live(self.root, target)
        else:
            self._copy_synced(self._id(self.root), target)
        return target

    def _copy_live(self, source: Path, target: Path) -> None:
        target.mkdir()
        for entry in source.iterdir():
            if entry.is_dir():
                self._copy_live(entry, target / entry.name)
            else:
                (target / entry.name).write_bytes(self.bytes.get(self._id(entry), b""))

    def _copy_synced(self, folder: int, target: Path) -> None:
        target.mkdir()
        for name, (number, is_folder) in self.names.get(folder, {}).items():
            if is_folder:
                self._copy_synced(number, target / name)
            else:
                (target / name).write_bytes(self.bytes.get(number, b""))
