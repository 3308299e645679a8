"""Tensors to and from safetensors files, streamed through `files` and hashed on the way.

The format (8-byte header length, JSON header, raw little-endian bytes) is the one of the safetensors library, which
reads these files; its writer is not used because it holds a second copy of all bytes and goes around `files`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch

from ekiden.checkpoint import files
from ekiden.checkpoint.manifest import Damaged, FileRecord, Hashes

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> FileRecord:
    """Write `tensors` to the new file `path`, durably; return its size and hashes.

    Tensors may be on any device and need not be contiguous: each is copied to the host on its own.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes = Hashes()
    with files.DurableFile(path) as file:
        for data in (struct.pack("<Q", len(text)), text):
            hashes.update(data)
            file.write(data)
        for _name, tensor in sorted(tensors.items()):
            if tensor.numel():
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                hashes.update(raw.data)
                file.write(raw.data)
    return hashes.record()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, by name, in host memory.

    Raises:
        Damaged: it is not one (the library checks header, offsets and sizes against the file).
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise Damaged(f"{path.name} cannot be read ({error})") from None
