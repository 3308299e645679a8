"""Every file operation of a checkpoint: create, write, fsync, rename, fsync of the folder, remove, read.

The store and the run directory go through here and nowhere else, so that a test can make any single operation
fail or end the process there (`fault_hook`), and so that the order write - fsync - rename - fsync of the
folder, which a power cut needs, stands in one place. Without the fsyncs a renamed file may be empty after a
power cut (measured on ext4 with noauto_da_alloc: 20 of 20 lost).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 4 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

fault_hook: Callable[[str, Path], None] | None = None
"""Called with (operation, path) before each operation; a test raises OSError from it, or ends the process.

Operations: create, write, fsync (a file), mkdir, rename, exchange, sync (a folder), unlink, rmdir, open,
read.
"""

_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an input/output error",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.EMFILE: "too many files are open in this process",
    errno.ELOOP: "it is a symbolic link",
    errno.ENOTDIR: "it is not a folder",
}


def reason(error: OSError | MemoryError) -> str:
    """Return in words why an operation failed, to stand in a sentence."""
    if isinstance(error, MemoryError):
        return "the memory is used up"
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


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
            try:
                view = view[self._file.write(view[:CHUNK_BYTES]) :]
            except OSError as error:
                error.filename = str(self.path)  # a descriptor knows no name, and a message needs one
                raise

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


def make_folders(path: Path) -> None:
    """Create `path` and what is missing above it, durably; nothing happens where it exists."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        make_folder(folder)
        sync_folder(folder.parent)


def rename(source: Path, target: Path) -> None:
    """Rename atomically, replacing a file (or an empty folder) at `target`."""
    _about_to("rename", source)
    source.replace(target)


def _find_renameat2() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None


_renameat2 = _find_renameat2()


def exchange(first: Path, second: Path) -> bool:
    """Swap two existing names in one atomic step; return False where the system or file system cannot."""
    if _renameat2 is None:
        return False
    _about_to("exchange", first)
    names = os.fsencode(first), os.fsencode(second)
    if _renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (*_UNSUPPORTED, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(first))


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable, as far as its file system can (some network and FUSE mounts cannot)."""
    _about_to("sync", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def sync_file(descriptor: int, path: Path) -> None:
    """Make what was written to the open file `path` durable."""
    _about_to("fsync", path)
    os.fsync(descriptor)


def remove_file(path: Path) -> None:
    """Remove a file or a symbolic link (not what it points to); nothing happens where there is none."""
    _about_to("unlink", path)
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it, or a file; symbolic links are removed, never followed.

    Raises:
        OSError: something cannot be removed; it stays, with what was not yet reached.
    """
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_folder:
        remove_file(path)
        return
    for entry in sorted(path.iterdir()):
        remove_tree(entry)
    _about_to("rmdir", path)
    path.rmdir()


@contextlib.contextmanager
def _taking_the_name(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; the durable file that the block left there is renamed to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if temporary.exists():
            remove_file(temporary)
        yield temporary
        rename(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_file(temporary)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; what the block wrote there gets the name `path` once it is whole and durable.

    For a file that something else writes; the block closes it. After an error what was at `path` stays.

    Raises:
        OSError: the disk is full or fails.
    """
    with _taking_the_name(path) as temporary:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            sync_file(descriptor, temporary)
        finally:
            os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that there is always the old one or the new one, whole."""
    with _taking_the_name(path) as temporary, DurableFile(temporary) as file:
        file.write(data)


class NotRegular(OSError):
    """What was to be read is a folder, a device, a socket or a pipe."""


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a symbolic link or a device is refused, and a pipe does not block.

    Raises:
        OSError: it cannot be opened; `NotRegular` where it is not a regular file.
    """
    _about_to("open", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    # Only now is it known what it is; a folder cannot even be turned into a file object.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(errno.EINVAL, "it is not a regular file", str(path))
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        yield file


def read_chunks(path: Path, limit: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a regular file, at most the first `limit`.

    Raises:
        OSError: as `open_regular`; or it cannot be read to its end.
    """
    left = limit
    with open_regular(path) as file:
        while left is None or left > 0:
            _about_to("read", path)
            chunk = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
            if not chunk:
                return
            left = None if left is None else left - len(chunk)
            yield chunk


def read_start(path: Path, limit: int) -> bytes:
    """Return the first `limit` bytes of a regular file, or all of a shorter one.

    Raises:
        OSError: as `read_chunks`.
    """
    return b"".join(read_chunks(path, limit))


def size_and_sha256(path: Path, limit: int | None = None) -> tuple[int, str]:
    """Return size and SHA-256 of a regular file, or of its first `limit` bytes.

    Raises:
        OSError: as `read_chunks`.
    """
    digest, size = hashlib.sha256(), 0
    for chunk in read_chunks(path, limit):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write on the disk of `path`."""
    return shutil.disk_usage(path).free
