"""torch's `.pt` files: read without unpickling, written as a stream.

A `.pt` is a zip file of stored entries: NAME/data.pkl (the structure), NAME/data/KEY (the bytes of each storage),
NAME/version, NAME/byteorder. Dataset hosts that unpack archives leave the same as a folder; both are read. The bytes
of a storage stay in the file until a tensor is read. Everything that the file claims is compared with its own size
before anything of that size is made.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.checkpoint.data_pickle import NotData, Storage, load_pickle
from ekiden.checkpoint.lazy import (
    DTYPES,
    MAX_DIMENSIONS,
    LazyTensor,
    check_tree,
    read_range,
    strided_chunks,
)
from ekiden.checkpoint.pickle_writer import dump_pickle
from ekiden.errors import UserError

MAX_PICKLE_BYTES = 64 << 20
MAX_DIRECTORY_BYTES = 64 << 20
MAX_AMPLIFICATION = 16
_ALIGNMENT = 64
_KEY = re.compile(r"[0-9A-Za-z_]{1,64}")


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of one record lie; crc32 is None where the container has none."""

    path: Path
    offset: int
    bytes: int
    crc32: int | None


def is_torch(path: Path) -> bool:
    """Return whether `path` looks like a `.pt` file, of any age, or like one unpacked into a folder."""
    if path.is_dir():
        return _unpacked(path) is not None
    start = files.read_start(path.resolve(), 4)
    return start.startswith((b"PK\x03\x04", b"\x80")) or path.suffix in (".pt", ".pth", ".bin")


def _unpacked(folder: Path) -> Path | None:
    """Return the folder of `data.pkl`: `folder` itself, or the only folder in it."""
    for candidate in (folder, *(path for path in sorted(folder.iterdir())[:20] if path.is_dir())):
        if (candidate / "data.pkl").is_file():
            return candidate
    return None


def read_torch(path: Path) -> Any:
    """Return what the checkpoint at `path` holds, its tensors lazy.

    Views keep their values, not the memory that they share with others; one and the same tensor under two names stays
    one. NumPy numbers become Python's. Devices are left behind: every tensor is read to the host.

    Raises:
        UserError: it is damaged, of the format before torch 1.6, compressed, or holds something that is not data.
    """
    entries = _folder_entries(path) if path.is_dir() else _zip_entries(path.resolve(), path)
    record = entries.get("data.pkl")
    if record is None:
        raise UserError(f"{path} holds no data.pkl, so it is not a torch checkpoint; give another file")
    if record.bytes > MAX_PICKLE_BYTES:
        raise UserError(f"{path} has a data.pkl of {record.bytes} bytes; save the large parts as tensors")
    if "constants.pkl" in entries:
        raise UserError(f"{path} is a TorchScript program; save its state_dict() with torch.save instead")
    if "byteorder" in entries and _read(entries["byteorder"]).strip() != b"little":
        raise UserError(f"{path} was written on a big-endian machine; save it again on a little-endian one")

    def make_tensor(
        storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str
    ) -> LazyTensor:
        return _tensor(entries.get(f"data/{storage.key}"), storage, offset, shape, stride, dtype)

    try:
        value = load_pickle(_read(record), make_tensor)
    except NotData as problem:
        raise UserError(
            f"{path} is not taken: {problem}; only tensors and plain values are read, save those alone "
            "with torch.save (nothing in the file was run)"
        ) from None
    tensors = check_tree(value, str(path))
    distinct = {tensor.identity: tensor.bytes for tensor in tensors}
    present = sum(entry.bytes for entry in entries.values())
    if sum(distinct.values()) > MAX_AMPLIFICATION * present + (64 << 20):
        raise UserError(
            f"{path} claims {sum(distinct.values())} bytes of tensors and holds {present}; save expanded tensors "
            "with .clone()"
        )
    return value


def _read(entry: _Entry) -> bytes:
    return b"".join(_checked(entry))


def _checked(entry: _Entry) -> Iterator[bytes]:
    """Yield the bytes of a record, comparing them with its checksum."""
    crc32 = 0
    for chunk in read_range(entry.path, entry.offset, entry.bytes):
        crc32 = zlib.crc32(chunk, crc32)
        yield chunk
    if entry.crc32 is not None and crc32 != entry.crc32:
        raise UserError(
            f"{entry.path} is damaged near byte {entry.offset} (or was written with torch's checksums switched off); "
            "copy it again, or load and save it with torch"
        )


def _tensor(
    entry: _Entry | None,
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: str,
) -> LazyTensor:
    """Return a tensor of a storage, after comparing its shape and strides with the bytes that are there.

    Raises:
        NotData: they do not fit.
    """
    item = DTYPES[dtype].item_bytes
    elements = math.prod(shape)
    if not _KEY.fullmatch(storage.key) or len(shape) > MAX_DIMENSIONS:
        raise NotData("it has a storage or shape that cannot be")
    present = entry.bytes if entry else 0
    reach = sum((n - 1) * step for n, step in zip(shape, stride)) + 1 if elements else 0
    if storage.bytes > present or (offset + reach) * item > present:
        raise NotData(
            f"a tensor of shape {str(list(shape))[:60]} needs {max(storage.bytes, (offset + reach) * item)} bytes of "
            f"data/{storage.key}, which has {present}"
        )
    identity: Hashable = (storage.key, offset, shape, stride, dtype)
    if not elements:
        return LazyTensor(dtype, shape, lambda: iter(()), identity)
    assert entry is not None
    found = entry
    if _is_contiguous(shape, stride):
        whole = offset == 0 and elements * item == found.bytes

        def read() -> Iterator[bytes]:
            if whole:
                return _checked(found)
            return read_range(found.path, found.offset + offset * item, elements * item)

    else:

        def read() -> Iterator[bytes]:
            data = bytearray().join(read_range(found.path, found.offset + offset * item, reach * item))
            return strided_chunks(data, item, shape, stride)

    return LazyTensor(dtype, shape, read, identity)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride)):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _folder_entries(path: Path) -> dict[str, _Entry]:
    """Return the records of an unpacked `.pt`."""
    root = _unpacked(path)
    assert root is not None
    entries = {}
    names = [p for p in root.iterdir() if p.is_file()]
    names += [p for p in (root / "data").iterdir() if p.is_file()] if (root / "data").is_dir() else []
    for file in names:
        name = str(file.relative_to(root))
        entries[name] = _Entry(file.resolve(), 0, file.stat().st_size, None)
    return entries


def _zip_entries(path: Path, shown: Path) -> dict[str, _Entry]:
    """Return the records of a `.pt` file, without the name of the folder that holds them all."""
    old = (
        f"{shown} is not in the zip format that torch has written since 1.6; load it once with "
        "torch.load(..., weights_only=True) and save it again with torch.save"
    )
    try:
        with files.open_regular(path) as file:
            if file.read(4) != b"PK\x03\x04":
                raise UserError(old)
            size = path.stat().st_size
            _check_directory(path, size)
            infos = zipfile.ZipFile(file).infolist()
            entries = {}
            for info in infos:
                entries[info.filename] = _entry(file, info, path, size)
    except (zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeDecodeError, ValueError):
        raise UserError(f"{shown} is cut short or damaged; copy it again from where it was saved") from None
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({files.reason(error)}); mend that and try again") from None
    if sum(entry.bytes for entry in entries.values()) > size or len(entries) != len(infos):
        raise UserError(f"{shown} has entries that overlap, which torch never writes; it is not taken")
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    root = min(roots, key=len, default="")
    return {
        name.removeprefix(root): entry for name, entry in entries.items() if root and name.startswith(root)
    }


def _check_directory(path: Path, size: int) -> None:
    """Refuse a directory of entries that would fill the memory: zipfile reads all of it.

    Raises:
        UserError: it is larger than `MAX_DIRECTORY_BYTES`.
        BadZipFile: there is none.
    """
    tail = b"".join(read_range(path, max(0, size - 65_557), min(size, 65_557)))
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise zipfile.BadZipFile
    length = struct.unpack_from("<I", tail, end + 12)[0]
    wide = tail.rfind(b"PK\x06\x06", 0, end)
    if length == 0xFFFFFFFF and wide >= 0:
        length = struct.unpack_from("<Q", tail, wide + 40)[0]
    if length > MAX_DIRECTORY_BYTES:
        raise UserError(
            f"{path} has a zip directory of {length} bytes, which torch never writes; it is not taken"
        )


def _entry(file: Any, info: zipfile.ZipInfo, path: Path, size: int) -> _Entry:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise UserError(
            f"{path} holds {info.filename[:60]!r} compressed or encrypted, which torch never writes; unpack it and "
            "zip it again with `zip -0 -r`"
        )
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    offset = info.header_offset + 30 + name_bytes + extra_bytes
    if offset + info.file_size > size:
        raise zipfile.BadZipFile
    return _Entry(path, offset, info.file_size, info.CRC)


def write_torch(path: Path, value: Any) -> None:
    """Write `value`, a tree with lazy tensors, as a `.pt` that torch.load(weights_only=True) opens.

    One tensor's chunk is in memory at a time. Tied tensors share one storage, as with torch.save.

    Raises:
        UserError: it holds something that cannot be kept.
        OSError: the disk is full or fails.
    """
    tensors = check_tree(value, "the checkpoint")
    keys: dict[Hashable, str] = {}
    ordered: list[LazyTensor] = []
    for tensor in tensors:
        if tensor.identity not in keys:
            keys[tensor.identity] = str(len(keys))
            ordered.append(tensor)
    data = dump_pickle(value, lambda tensor: keys[tensor.identity])
    with files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", len(data), lambda: iter([data]))
        _add(archive, "byteorder", 6, lambda: iter([b"little"]))
        for tensor in ordered:
            _add(archive, f"data/{keys[tensor.identity]}", tensor.bytes, tensor.read)
        _add(archive, "version", 2, lambda: iter([b"3\n"]))


def _add(archive: zipfile.ZipFile, name: str, size: int, read: Callable[[], Iterator[bytes]]) -> None:
    """Write one record, its data aligned as torch aligns it, so that it can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    wide = size > zipfile.ZIP64_LIMIT // 2
    fixed = archive.fp.tell() + 30 + len(info.filename) + (20 if wide else 0)
    padding = -(fixed + 4) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    info.file_size = size
    with archive.open(info, "w", force_zip64=wide) as record:
        for chunk in read():
            record.write(chunk)
