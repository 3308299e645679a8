"""A disk whose state can be taken at any instant, as it would be if the current failed there.

An ext4 image is served as the one file of a small FUSE file system and attached as a loop device, so every write and
every flush that ext4 sends to its disk comes by here, one at a time. A picture taken between two of them is exact,
and a drive's volatile cache can be modelled: what was written after the last flush has arrived, or not, or in part.
`power_cut` runs its writers on it. Needs root, /dev/fuse and a free loop device.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

CACHES = ("all written arrived", "unflushed lost", "unflushed in part")
"""What the drive's cache does in a power cut to what was written and not yet flushed."""
MEGABYTES = 64
_BLOCK, _MAX_WRITE, _FILE = 4096, 1 << 20, "image"


class _Op(IntEnum):
    """Operations of the kernel's FUSE protocol (linux/fuse.h, version 7.31): those that one plain file needs."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    ACCESS = 34
    BATCH_FORGET = 42


_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22


def why_not() -> str | None:
    """Return why there can be no such disk here, or None."""
    if os.geteuid() != 0:
        return "only root may mount a disk image"
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(path, os.R_OK | os.W_OK):
            return f"there is no {path}"
    for tool in ("mkfs.ext4", "e2fsck", "mount", "umount", "losetup"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    with tempfile.TemporaryDirectory() as name:
        try:
            with Disk(Path(name), blank(Path(name))):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            return f"a disk image cannot be mounted here ({str(detail).strip()[:100]})"


def blank(folder: Path, megabytes: int = MEGABYTES) -> Path:
    """Return a new image of an empty ext4 file system in `folder`."""
    image = folder / "blank"
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    _run("mkfs.ext4", "-q", "-F", "-E", options, "-J", "size=4", str(image))
    return image


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def mounted(image: Path, folder: Path, options: str = "") -> Iterator[Path]:
    """Mount an image file on a new folder, its journal replayed; unmounted at the end."""
    folder.mkdir()
    _run("mount", "-o", ",".join(["loop", *filter(None, [options])]), str(image), str(folder))
    try:
        yield folder
    finally:
        _unmount(folder)
        folder.rmdir()


def consistent(image: Path) -> bool:
    """Return whether an unmounted file system needs no repair."""
    return subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, check=False).returncode == 0


def _unmount(folder: Path) -> None:
    for _ in range(50):
        done = subprocess.run(["umount", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.1)  # a process that was killed a moment ago may still be going
    raise OSError(errno.EBUSY, done.stderr.strip(), str(folder))


@dataclass(frozen=True)
class Picture:
    """What was known at the instant of a picture.

    unflushed: blocks of 4 KiB written since the last flush; lost: those of them that did not arrive. said: the last
    line written to `Disk.acknowledge` before that instant.
    """

    unflushed: int
    lost: int
    said: str


class Disk:
    """A mounted disk, for a `with` block.

    Args:
        work: a folder for the mounts and pictures. image: what it holds at the start; not changed. options: of the
        mount.

    Attributes:
        folder: where it is mounted. acknowledge: a descriptor for lines of which a picture knows whether they were
            written before it.
    """

    def __init__(self, work: Path, image: Path, options: str = "") -> None:
        self.work, self.options = work, options
        self.folder, self._lower = work / "disk", work / "fuse"
        self._image = image

    def __enter__(self) -> Disk:
        with contextlib.ExitStack() as stack:
            self.folder.mkdir()
            stack.callback(self.folder.rmdir)
            self._lower.mkdir()
            stack.callback(self._lower.rmdir)
            self._serve(stack)
            device = _run("losetup", "--find", "--show", str(self._lower / _FILE))
            stack.callback(_run, "losetup", "--detach", device)
            _run("mount", *(["-o", self.options] if self.options else []), device, str(self.folder))
            stack.callback(_unmount, self.folder)
            self._stack = stack.pop_all()
        return self

    def _serve(self, stack: contextlib.ExitStack) -> None:
        """Mount the file system of one file, and start the process that answers for it."""
        device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"power-cut", os.fsencode(self._lower), b"fuse", 0, options):
            os.close(device)
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self._lower))
        self._control, theirs = socket.socketpair()
        said, self.acknowledge = os.pipe()
        child = os.fork()
        if child == 0:
            self._control.close()
            _serve_forever(device, theirs, said, self._image)
        self._answers = self._control.makefile()
        os.close(said)
        stack.callback(os.close, self.acknowledge)
        os.close(device)
        theirs.close()
        stack.callback(os.waitpid, child, 0)
        stack.callback(self._control.close)
        stack.callback(_unmount, self._lower)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def picture(self, path: Path, cache: str, seed: int, after_writes: int = 0) -> Picture:
        """Write to `path` what the disk would hold if the current failed now, or so many writes from now.

        Args:
            cache: one of `CACHES`. seed: decides which part of what was not flushed is lost.

        Raises:
            TimeoutError: nothing wrote for a minute.
        """
        command = {"path": str(path), "cache": cache, "seed": seed, "after": after_writes}
        self._control.settimeout(300)
        self._control.sendall(json.dumps(command).encode() + b"\n")
        return Picture(**json.loads(self._answers.readline()))


class _Platter:
    """The bytes of the disk: as written, as of the last flush, and what was written in between."""

    def __init__(self, image: bytes) -> None:
        self.written, self.flushed = bytearray(image), bytearray(image)
        self.pending: list[tuple[int, bytes]] = []
        self.writes = 0

    def write(self, offset: int, data: bytes) -> None:
        self.writes += 1
        self.written[offset : offset + len(data)] = data
        for begin in range(0, len(data), _BLOCK):
            self.pending.append((offset + begin, data[begin : begin + _BLOCK]))

    def flush(self) -> None:
        for offset, data in self.pending:
            self.flushed[offset : offset + len(data)] = data
        self.pending.clear()

    def picture(self, path: Path, cache: str, seed: int) -> tuple[int, int]:
        """Write a picture; return how many blocks were not flushed, and how many of them did not arrive."""
        generator = random.Random(seed)
        chances = dict(zip(CACHES, (1.0, 0.0, generator.random()), strict=True))
        data, lost = bytearray(self.flushed), 0
        for offset, block in self.pending:
            if generator.random() < chances[cache]:
                data[offset : offset + len(block)] = block
            else:
                lost += 1
        zeros = bytes(1 << 16)
        with path.open("wb") as file:
            for begin in range(0, len(data), len(zeros)):
                piece = data[begin : begin + len(zeros)]
                if piece != zeros:
                    file.seek(begin)
                    file.write(piece)
            file.truncate(len(data))
        return len(self.pending), lost


def _serve_forever(device: int, control: socket.socket, said: int, image: Path) -> None:
    """Answer the kernel and the driver until the file system is unmounted; never return."""
    try:
        platter = _Platter(image.read_bytes())
        server, commands = _Server(device, platter), control.makefile()
        os.set_blocking(said, False)
        heard, command, begun = b"", None, 0
        watched: list[Any] = [device, control]
        while True:
            ready, _, _ = select.select(watched, [], [])
            if control in ready:
                if not (line := commands.readline()):
                    break
                command, begun = json.loads(line), platter.writes
            if command and platter.writes - begun >= command["after"]:
                with contextlib.suppress(BlockingIOError):
                    while more := os.read(said, 1 << 16):
                        heard += more
                numbers = platter.picture(Path(command["path"]), command["cache"], command["seed"])
                last = heard.rpartition(b"\n")[0].rpartition(b"\n")[2].decode()
                control.sendall(json.dumps(asdict(Picture(*numbers, last))).encode() + b"\n")
                command = None
            if device in ready and not server.answer():
                break
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class _Server:
    """Answers the kernel's requests for a folder (node 1) with one file (node 2)."""

    def __init__(self, device: int, platter: _Platter) -> None:
        self.device, self.platter = device, platter

    def answer(self) -> bool:
        """Answer one request; return False when the file system has been unmounted."""
        try:
            request = os.read(self.device, _MAX_WRITE + _BLOCK)
        except OSError as error:
            # Unmounted; or the request was withdrawn before it was read.
            return error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN)
        operation, unique, node = struct.unpack_from("<IQQ", request, 4)
        if operation in (_Op.FORGET, _Op.BATCH_FORGET):
            return True
        result = self._result(operation, node, request[40:])
        number, body = (-result, b"") if isinstance(result, int) else (0, result)
        with contextlib.suppress(FileNotFoundError):  # the asker was killed meanwhile
            os.write(self.device, struct.pack("<IiQ", 16 + len(body), number, unique) + body)
        return True

    def _result(self, operation: int, node: int, body: bytes) -> bytes | int:
        """Return the body of an answer, or an error number."""
        match operation:
            case _Op.INIT:
                head = struct.pack("<IIIIHH", 7, 31, 1 << 17, _BIG_WRITES | _MAX_PAGES, 12, 9)
                return head + struct.pack("<IIHH", _MAX_WRITE, 1, _MAX_WRITE // 4096, 0) + bytes(28)
            case _Op.LOOKUP:
                if body.rstrip(b"\0") != _FILE.encode():
                    return errno.ENOENT
                return struct.pack("<QQQQII", 2, 0, 3600, 3600, 0, 0) + self._attributes(2)
            case _Op.GETATTR | _Op.SETATTR:
                return struct.pack("<QII", 3600, 0, 0) + self._attributes(node)
            case _Op.OPEN | _Op.OPENDIR:
                return struct.pack("<QIi", 0, 0, 0)
            case _Op.READ:
                offset, size = struct.unpack_from("<QI", body, 8)
                return bytes(self.platter.written[offset : offset + size])
            case _Op.WRITE:
                offset, size = struct.unpack_from("<QI", body, 8)
                self.platter.write(offset, body[40 : 40 + size])
                return struct.pack("<II", size, 0)
            case _Op.FSYNC:  # what a flush sent to the disk becomes here
                self.platter.flush()
                return b""
            case (
                _Op.RELEASE | _Op.FLUSH | _Op.RELEASEDIR | _Op.ACCESS
            ):  # FLUSH is a close, not a disk's flush
                return b""
        return errno.ENOSYS

    def _attributes(self, node: int) -> bytes:
        size, mode = (len(self.platter.written), 0o100600) if node == 2 else (0, 0o40700)
        return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, _BLOCK, 0)
