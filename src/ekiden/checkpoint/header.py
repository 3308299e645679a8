"""The header of a safetensors file, written and checked without any tensor library.

A file is 8 bytes of header length (little-endian), the JSON header {name: {dtype, shape, data_offsets}}, then
the raw little-endian bytes. `manifest` compares what a file's header claims with what was saved; `tensors`
adds the bytes. The format is that of https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.checkpoint.strict_json import Damaged, parse_json

MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 16
MAX_LENGTH = 1 << 40
METADATA = "__metadata__"

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: dtype as in `ITEM_BYTES`, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def layout(tensors: dict[str, TensorInfo]) -> list[str]:
    """Return the names in file order: widest dtype first, which aligns every tensor to its own width."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))


def encode_header(tensors: dict[str, TensorInfo], metadata: dict[str, str] | None = None) -> bytes:
    """Return the bytes before the data of a file that holds `tensors` in the order of `layout`."""
    header: dict[str, object] = {METADATA: metadata} if metadata else {}
    offset = 0
    for name in layout(tensors):
        info = tensors[name]
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.bytes],
        }
        offset += info.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that the file `path` holds, nothing allocated for them.

    Raises:
        Damaged: it is not a safetensors file, or claims shapes, offsets or a length that cannot be.
        OSError: it cannot be read.
    """
    size = path.lstat().st_size
    prefix = files.read_start(path, 8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise Damaged(f"{path.name} is not a safetensors file (header of {length} bytes in {size})")
    value = parse_json(files.read_start(path, 8 + length)[8:], f"the header of {path.name}")
    if not isinstance(value, dict):
        raise Damaged(f"the header of {path.name} is not an object")
    value.pop(METADATA, None)
    spans = {name: _tensor(path.name, name, entry) for name, entry in value.items()}
    end = 0
    for name, (begin, info) in sorted(spans.items(), key=lambda item: (item[1][0], item[1][1].bytes)):
        if begin != end:
            raise Damaged(f"{path.name} places {name[:80]!r} at byte {begin}, expected {end}")
        end += info.bytes
    if end != size - 8 - length:
        raise Damaged(f"{path.name} describes {end} bytes of tensors, found {size - 8 - length}")
    return {name: info for name, (_begin, info) in spans.items()}


def _tensor(filename: str, name: str, entry: Any) -> tuple[int, TensorInfo]:
    """Return where the tensor begins, and what it is."""
    wrong = f"{filename} describes {name[:80]!r} with a "
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Damaged(wrong + "set of fields that is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Damaged(wrong + f"dtype {str(dtype)[:20]!r} that is unknown")
    if not _lengths(shape) or len(shape) > MAX_DIMENSIONS:
        raise Damaged(wrong + f"shape {str(shape)[:60]} that cannot be one")
    if not _lengths(offsets) or len(offsets) != 2:
        raise Damaged(wrong + f"place {str(offsets)[:60]} that cannot be one")
    info = TensorInfo(dtype, tuple(shape))
    if offsets[1] - offsets[0] != info.bytes:
        raise Damaged(wrong + f"shape {info} of {info.bytes} bytes, and place for {offsets[1] - offsets[0]}")
    return offsets[0], info


def _lengths(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < MAX_LENGTH for n in value)
