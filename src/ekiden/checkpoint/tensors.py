"""Tensors to and from safetensors files, streamed through `files` and hashed on the way.

The safetensors library reads these files; its writer is not used because it holds a second copy of all bytes
and goes around `files`. Names, dtypes and shapes go into the manifest and are compared with the file before
it is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch

from ekiden.checkpoint import files
from ekiden.checkpoint.header import METADATA, TensorInfo, encode_header, layout, read_header
from ekiden.checkpoint.manifest import Damaged, FileRecord, Hashes, describe_tensors

_ERROR_NUMBER = re.compile(r"\((\d+)\)$")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> FileRecord:
    """Write `tensors` to the new file `path`, durably; return its size, hashes and tensors.

    Tensors may be on any device and need not be contiguous: each is copied to the host on its own, so the
    memory needed beside them is that of the largest one.

    Raises:
        ValueError: a dtype that the format has not, or a name that it reserves.
        OSError: the disk is full or fails.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or name == METADATA:
            raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot stand in a safetensors file")
    infos = {name: TensorInfo(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    hashes = Hashes()
    with files.DurableFile(path) as file:
        header = encode_header(infos, metadata)
        hashes.update(header)
        file.write(header)
        for name in layout(infos):
            if tensors[name].numel():
                raw = _raw(tensors[name])
                hashes.update(raw)
                file.write(raw)
    return hashes.record(describe_tensors(infos))


def _raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor that has some, in row-major order."""
    host = tensor.detach().cpu().contiguous()
    # One element may have any stride and still count as contiguous; a view as bytes needs a stride of 1.
    return host.as_strided((host.numel(),), (1,)).view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, by name, in host memory (mapped: paged in when first
    touched).

    Raises:
        Damaged: it is not one; its header is checked before the library sees it.
        OSError: it cannot be read.
    """
    expected = read_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in expected}
    except safetensors.SafetensorError as error:
        raise Damaged(f"{path.name} cannot be read ({str(error)[:200]})") from None
    except RuntimeError as error:
        # torch opens and maps the file for the library, and ends its message with the system's error number.
        if (match := _ERROR_NUMBER.search(str(error))) is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
