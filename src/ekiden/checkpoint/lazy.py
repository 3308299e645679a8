"""Tensors that stay in their file until their bytes are asked for, and the values that a checkpoint holds around them.

`torch_format`, `json_format` and `folder_format` read a file into a tree of plain Python values with `LazyTensor`
leaves, and write such a tree; `convert` joins a reader with a writer. torch is imported only to make real tensors: the
import alone takes 200 MB, more than a conversion.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ekiden.checkpoint import files
from ekiden.errors import UserError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 3 << 20  # divisible by 3, so that every chunk but the last is whole in base64
MAX_DEPTH = 24
MAX_VALUES = 1_000_000
MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class DType:
    """An element type: bytes of one, its storage class in torch's old typed pickles, its safetensors code."""

    item_bytes: int
    storage: str | None = None
    code: str | None = None


DTYPES = {
    "float64": DType(8, "DoubleStorage", "F64"),
    "float32": DType(4, "FloatStorage", "F32"),
    "float16": DType(2, "HalfStorage", "F16"),
    "bfloat16": DType(2, "BFloat16Storage", "BF16"),
    "int64": DType(8, "LongStorage", "I64"),
    "int32": DType(4, "IntStorage", "I32"),
    "int16": DType(2, "ShortStorage", "I16"),
    "int8": DType(1, "CharStorage", "I8"),
    "uint8": DType(1, "ByteStorage", "U8"),
    "bool": DType(1, "BoolStorage", "BOOL"),
    "complex128": DType(16, "ComplexDoubleStorage"),
    "complex64": DType(8, "ComplexFloatStorage"),
    "uint64": DType(8, None, "U64"),
    "uint32": DType(4, None, "U32"),
    "uint16": DType(2, None, "U16"),
    "float8_e4m3fn": DType(1),
    "float8_e5m2": DType(1),
    "float8_e4m3fnuz": DType(1),
    "float8_e5m2fnuz": DType(1),
}
"""Every element type that is converted, by torch's name."""


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in a file.

    Attributes:
        dtype: key of `DTYPES`. read: yields its elements row by row, little-endian, in pieces of a few MB.
        identity: equal for tensors that are one and the same memory (tied weights); such are kept once.
        requires_grad, parameter: as torch had them; a state dict's tensors have neither.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterator[bytes]]
    identity: Hashable
    requires_grad: bool = False
    parameter: bool = False

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].item_bytes

    def load(self) -> torch.Tensor:
        """Return it in host memory."""
        import torch

        dtype = getattr(torch, self.dtype)
        if not self.bytes:
            tensor = torch.empty(self.shape, dtype=dtype)
        else:
            buffer = bytearray(self.bytes)
            position = 0
            for chunk in self.read():
                buffer[position : position + len(chunk)] = chunk
                position += len(chunk)
            tensor = torch.frombuffer(buffer, dtype=dtype).reshape(self.shape)
        if self.parameter:
            return torch.nn.Parameter(tensor, requires_grad=self.requires_grad)
        return tensor.requires_grad_() if self.requires_grad else tensor


@dataclass(frozen=True)
class TorchValue:
    """A torch.Size ("Size", tuple of lengths), torch.dtype ("dtype", name) or torch.device ("device", name)."""

    kind: str
    value: Any

    def load(self) -> Any:
        """Return torch's own object."""
        import torch

        if self.kind == "dtype":
            return getattr(torch, self.value)
        return torch.Size(self.value) if self.kind == "Size" else torch.device(self.value)


def read_range(path: Path, offset: int, length: int) -> Iterator[bytes]:
    """Yield `length` bytes of the regular file `path` from `offset`.

    Raises:
        UserError: the file ends before, or cannot be read.
    """
    try:
        with files.open_regular(path) as file:
            file.seek(offset)
            while length:
                chunk = file.read(min(length, CHUNK_BYTES))
                if not chunk:
                    raise UserError(f"{path} ends {length} bytes too early; copy it again")
                length -= len(chunk)
                yield chunk
    except OSError as error:
        raise UserError(f"{path} cannot be read ({files.reason(error)}); mend that and try again") from None


def rechunk(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Yield the same bytes in pieces of exactly `size`, the last one shorter."""
    pending = b""
    for chunk in chunks:
        pending = pending + chunk if pending else chunk
        whole = len(pending) - len(pending) % size
        for begin in range(0, whole, size):
            yield pending[begin : begin + size]
        pending = pending[whole:]
    if pending:
        yield pending


def strided_chunks(
    data: bytearray, item_bytes: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Iterator[bytes]:
    """Yield the elements of a view into `data` (at 0) row by row; strides count elements."""
    items = np.frombuffer(data, dtype=f"V{item_bytes}")
    view = np.lib.stride_tricks.as_strided(items, shape, [step * item_bytes for step in stride])
    if not shape:
        yield view.tobytes()
        return
    row = math.prod(shape[1:]) * item_bytes
    rows = max(1, CHUNK_BYTES // max(1, row))
    for begin in range(0, shape[0], rows):
        yield view[begin : begin + rows].tobytes()


def check_tree(value: Any, where: str) -> list[LazyTensor]:
    """Return the tensors in `value`, in order, after checking that it can be kept and is not endless.

    Raises:
        UserError: it goes deeper than `MAX_DEPTH` (or round in a circle), holds more than `MAX_VALUES` values, or
            something that is not data.
    """
    tensors: list[LazyTensor] = []
    stack: list[tuple[Any, int]] = [(value, 0)]
    count = 0
    while stack:
        item, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            what = f"{MAX_VALUES} values" if count > MAX_VALUES else f"{MAX_DEPTH} levels of lists and dicts"
            raise UserError(f"{where} holds more than {what}, so it is not converted; save it without them")
        if isinstance(item, LazyTensor):
            tensors.append(item)
        elif isinstance(item, dict):
            children = [child for pair in dict.items(item) for child in pair]
            children.append(getattr(item, "_metadata", None))
            stack.extend((child, depth + 1) for child in reversed(children))
        elif isinstance(item, (list, tuple, set)):
            stack.extend((child, depth + 1) for child in reversed(list(item)))
        elif type(item) is int:
            if not -(2**63) <= item < 2**64:
                raise UserError(f"{where} holds an integer beyond 64 bits; save it as a string instead")
        elif item is not None and type(item) not in (bool, float, str, bytes, TorchValue):
            raise UserError(f"{where} holds a {type(item).__name__}, which is not data; save it without that")
    return tensors


def load_tree(value: Any) -> Any:
    """Return `value` as `torch.load` would: every lazy tensor loaded, tied ones as one tensor."""
    return _load(value, {})


def _load(value: Any, done: dict[Hashable, Any]) -> Any:
    if isinstance(value, LazyTensor):
        key = (value.identity, value.parameter, value.requires_grad)
        if key not in done:
            done[key] = value.load()
        return done[key]
    if isinstance(value, TorchValue):
        return value.load()
    if isinstance(value, dict):
        result = type(value)((_load(key, done), _load(item, done)) for key, item in dict.items(value))
        if isinstance(result, OrderedDict) and hasattr(value, "_metadata"):
            result._metadata = value._metadata  # type: ignore[attr-defined]
        return result
    if isinstance(value, (list, tuple, set)):
        return type(value)(_load(item, done) for item in value)
    return value
