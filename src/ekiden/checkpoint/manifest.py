"""`MANIFEST.json`: what a checkpoint folder holds, with a hash of every file; and reading it without trusting
it.

The store writes it last, so a folder without one was never finished. It comes from a disk or a dataset host
that may have damaged it, or from somebody else: it is bounded, strict, and names files of its own folder
only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ekiden.checkpoint import files
from ekiden.checkpoint.header import TensorInfo, read_header
from ekiden.checkpoint.strict_json import Damaged, Unreadable, parse_json

__all__ = [
    "NAME",
    "Damaged",
    "FileRecord",
    "Hashes",
    "Manifest",
    "Unreadable",
    "read_manifest",
    "verify_folder",
]

NAME = "MANIFEST.json"
FORMAT_VERSION = 1
MAX_BYTES = 4 << 20
MAX_FILES = 10_000
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_FIELDS = {"xxh3", "version", "step", "created", "files", "run"}
# The first line is a hash of every byte after it: a bit that flips in a step or a loss has to be found too.
_BEFORE_HASH, _AFTER_HASH, _HASH_DIGITS = b'{\n "xxh3": "', b'",\n', 32
_RECORD_FIELDS = {"bytes", "xxh3", "sha256"}


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: size in bytes, xxh3-128 (against damage) and SHA-256 (identity), in hex.

    tensors: what a tensor file holds, {name: "F32[2,3]"}; None for any other file.
    """

    bytes: int
    xxh3: str
    sha256: str
    tensors: dict[str, str] | None = None


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest.

    step: optimizer steps done, which orders checkpoints. files: by name. run: what the caller added. created:
    when it was written, for people only (clocks jump).
    """

    step: int
    files: dict[str, FileRecord]
    run: dict[str, Any]
    created: str = ""

    def to_json(self) -> bytes:
        """Return the bytes of the file.

        Raises:
            ValueError: `run` holds what JSON has not, such as NaN.
        """
        records = {name: dict(vars(record)) for name, record in sorted(self.files.items())}
        for record in records.values():
            if record["tensors"] is None:
                del record["tensors"]
        value = {
            "version": FORMAT_VERSION,
            "step": self.step,
            "created": self.created,
            "files": records,
            "run": self.run,
        }
        return seal((json.dumps(value, indent=1, allow_nan=False) + "\n").encode()[2:])

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(record.bytes for record in self.files.values())


class Hashes:
    """Both hashes of a stream of bytes.

    Measured on one core: xxh3 6 to 20 GB/s, SHA-256 1.8 GB/s with the processor's SHA instructions and 0.25 without;
    so only a save computes SHA-256, beside training, and a load verifies by xxh3 and size.
    """

    def __init__(self, identity: bool = True) -> None:
        self.bytes = 0
        self._xxh3 = xxhash.xxh3_128()
        self._sha256 = hashlib.sha256() if identity else None

    def update(self, data: bytes | memoryview) -> None:
        """Add `data`."""
        self.bytes += len(data)
        self._xxh3.update(data)
        if self._sha256 is not None:
            self._sha256.update(data)

    def record(self, tensors: dict[str, str] | None = None) -> FileRecord:
        """Return size and hashes of what was added, with the `tensors` of a tensor file."""
        return FileRecord(
            self.bytes, self._xxh3.hexdigest(), self._sha256.hexdigest() if self._sha256 else "", tensors
        )


def seal(body: bytes) -> bytes:
    """Return the manifest's bytes: its own hash, then `body`, which is the object after its opening bracket."""
    return _BEFORE_HASH + xxhash.xxh3_128(body).hexdigest().encode() + _AFTER_HASH + body


def _check_seal(data: bytes) -> None:
    begin = len(_BEFORE_HASH)
    end = begin + _HASH_DIGITS
    if not data.startswith(_BEFORE_HASH) or data[end : end + len(_AFTER_HASH)] != _AFTER_HASH:
        raise Damaged(f"{NAME} does not begin with its own hash")
    found = xxhash.xxh3_128(data[end + len(_AFTER_HASH) :]).hexdigest().encode()
    if found != data[begin:end]:
        raise Damaged(
            f"{NAME} has hash {found.decode()}, expected {data[begin:end].decode(errors='replace')}"
        )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of `folder`; the files that it names are not looked at.

    Raises:
        Damaged: there is none, or it is not one that this program writes; `Unreadable` where it cannot be
            read now.
    """
    try:
        data = files.read_start(folder / NAME, MAX_BYTES + 1)
    except OSError as error:
        raise _cannot_read(NAME, error) from None
    if len(data) > MAX_BYTES:
        raise Damaged(f"{NAME} is larger than {MAX_BYTES} bytes")
    return parse_manifest(data)


def _cannot_read(name: str, error: OSError) -> Damaged:
    """Return the finding for a file that could not be read: damage if it is gone, else perhaps passing."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Damaged(f"{name} is missing")
    if error.errno == errno.ELOOP or isinstance(error, files.NotRegular):
        return Damaged(f"{name} is not used: {files.reason(error)}")
    return Unreadable(f"{name} cannot be read: {files.reason(error)}")


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest in `data`.

    Raises:
        Damaged: other bytes than were written, not JSON, not of this version, or values that no manifest has.
    """
    _check_seal(data)
    value = parse_json(data, NAME)
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise Damaged(f"{NAME} does not have the fields {', '.join(sorted(_FIELDS))}")
    if type(value["version"]) is not int or value["version"] != FORMAT_VERSION:
        raise Damaged(
            f"{NAME} has format version {str(value['version'])[:20]}; this program reads {FORMAT_VERSION}"
        )
    step, created, records, run = value["step"], value["created"], value["files"], value["run"]
    if type(step) is not int or not 0 <= step < 2**63:
        raise Damaged(f"{NAME} has step {str(step)[:40]}, expected a number of steps")
    if not isinstance(records, dict) or not isinstance(run, dict) or not isinstance(created, str):
        raise Damaged(f"{NAME} has files, run or created of the wrong type")
    if len(records) > MAX_FILES:
        raise Damaged(f"{NAME} names {len(records)} files, more than {MAX_FILES}")
    return Manifest(step, {name: _record(name, record) for name, record in records.items()}, run, created)


def check_name(name: str) -> None:
    """Raise Damaged unless `name` is a plain file name that a checkpoint may hold."""
    if not _SAFE_NAME.fullmatch(name) or name == NAME:
        raise Damaged(f"{NAME} names a file {name[:80]!r}, which is not a plain name in the folder")


def _record(name: str, record: Any) -> FileRecord:
    check_name(name)
    if not isinstance(record, dict) or not _RECORD_FIELDS <= set(record) <= _RECORD_FIELDS | {"tensors"}:
        raise Damaged(f"{NAME} does not describe {name} by bytes, xxh3 and sha256")
    size, xxh3, sha256 = record["bytes"], record["xxh3"], record["sha256"]
    if type(size) is not int or not 0 <= size < 2**60 or not _is_hex(xxh3, 32) or not _is_hex(sha256, 64):
        raise Damaged(f"{NAME} has a size or hash of {name} that cannot be one")
    tensors = record.get("tensors")
    if tensors is not None and not (
        isinstance(tensors, dict) and all(isinstance(shape, str) for shape in tensors.values())
    ):
        raise Damaged(f"{NAME} describes the tensors of {name} in a way that cannot be")
    return FileRecord(size, xxh3, sha256, tensors)


def _is_hex(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")


def describe_tensors(tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """Return names, dtypes and shapes as a manifest records them."""
    return {name: str(info) for name, info in sorted(tensors.items())}


def verify_folder(folder: Path) -> Manifest:
    """Read every byte of the checkpoint in `folder` and return its manifest.

    Raises:
        Damaged: a file is missing, of another size, with another hash or other tensors than when it was
            written; `Unreadable` where it cannot be read now.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        try:
            _verify_file(folder / name, expected)
        except OSError as error:
            raise _cannot_read(name, error) from None
    return manifest


def _verify_file(path: Path, expected: FileRecord) -> None:
    name, hashes = path.name, Hashes(identity=False)
    # One byte more than expected tells a longer file, however long it is.
    for chunk in files.read_chunks(path, expected.bytes + 1):
        hashes.update(chunk)
    found = hashes.record()
    if found.bytes != expected.bytes:
        size = f"more than {expected.bytes}" if found.bytes > expected.bytes else str(found.bytes)
        raise Damaged(f"{name} has {size} bytes, expected {expected.bytes}")
    if found.xxh3 != expected.xxh3:
        raise Damaged(f"{name} has hash {found.xxh3}, expected {expected.xxh3}")
    if expected.tensors is not None:
        _compare_tensors(name, describe_tensors(read_header(path)), expected.tensors)


def _compare_tensors(filename: str, found: dict[str, str], expected: dict[str, str]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise Damaged(
                f"{filename} holds tensor {name[:80]!r} as {found.get(name, 'nothing')[:80]}, "
                f"expected {expected.get(name, 'nothing')[:80]}"
            )


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return what lies in `folder` beside the manifest's files; it is never read."""
    return sorted(
        path.name for path in folder.iterdir() if path.name not in manifest.files and path.name != NAME
    )
