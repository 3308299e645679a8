"""Every file operation of a checkpoint: create, write, fsync, rename, fsync of the folder, remove.

The store and the run directory write through here and nowhere else, so that a test can make any single operation
fail or end the process there (`fault_hook`), and so that the order write - fsync - rename - fsync of the folder,
which a power cut needs, stands in one place. Without the fsyncs a renamed file may be empty after a power cut
(measured on ext4 with noauto_da_alloc: 20 of 20 lost).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 4 << 20

fault_hook: Callable[[str, Path], None] | None = None
"""Called with (operation, path) before each operation; a test raises OSError from it, or ends the process."""


def _about_to(operation: str, path: Path) -> None:
    if fault_hook is not None:
        fault_hook(operation, path)


class DurableFile:
    """A new file whose bytes are on the disk once the `with` block has ended without an error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> DurableFile:
        _about_to("create", self.path)
        self._file: BinaryIO = self.path.open("xb", buffering=0)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`; a short write is continued."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while len(view):
            _about_to("write", self.path)
            view = view[self._file.write(view[:CHUNK_BYTES]) :]

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                _about_to("fsync", self.path)
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def make_folder(path: Path) -> None:
    """Create `path`; it must not exist, its parent must."""
    _about_to("mkdir", path)
    path.mkdir()


def rename(source: Path, target: Path) -> None:
    """Rename atomically, replacing a file (or an empty folder) at `target`."""
    _about_to("rename", source)
    source.replace(target)


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable."""
    _about_to("sync", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it; what cannot be removed stays for the next clean-up."""
    _about_to("remove", path)
    shutil.rmtree(path, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that there is always the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        with DurableFile(temporary) as file:
            file.write(data)
        rename(temporary, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a regular file; a symbolic link or a device is refused.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path.name} is not a regular file")
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write on the disk of `path`."""
    return shutil.disk_usage(path).free
