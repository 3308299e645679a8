"""The pickle inside a torch checkpoint, written from lazy tensors: what `torch.save` writes, without the tensors.

`torch_format` puts the bytes beside it. `torch.save` needs every tensor in memory, and pickles by importing what it
names; here a name is a name. Protocol 2, as torch's own default, so that every torch reads it.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ekiden.checkpoint.data_pickle import Global, Storage
from ekiden.checkpoint.lazy import DTYPES, LazyTensor, TorchValue


def dump_pickle(value: Any, key_of: Callable[[LazyTensor], str]) -> bytes:
    """Return a pickle (protocol 2, as torch.save writes) of a tree that `lazy.check_tree` has passed.

    Args:
        key_of: returns the key of a tensor's storage, which holds its elements from the first to the last.
    """
    parts: list[bytes] = [b"\x80\x02"]
    _dump(value, key_of, parts.append)
    parts.append(b".")
    return b"".join(parts)


def _dump(value: Any, key_of: Callable[[LazyTensor], str], out: Callable[[bytes], None]) -> None:
    def dump(*items: Any) -> None:
        for item in items:
            _dump(item, key_of, out)

    def call(name: str, *arguments: Any) -> None:
        dump(Global(name), arguments)
        out(b"R")

    if value is None or isinstance(value, bool):
        out({None: b"N", True: b"\x88", False: b"\x89"}[value])
    elif isinstance(value, int):
        data = value.to_bytes(9, "little", signed=True)
        out(b"J" + data[:4] if -(2**31) <= value < 2**31 else b"\x8a\x09" + data)
    elif isinstance(value, float):
        out(b"G" + struct.pack(">d", value))
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        out(b"X" + struct.pack("<I", len(text)) + text)
    elif isinstance(value, bytes):
        call("_codecs encode", value.decode("latin1"), "latin1")
    elif isinstance(value, Global):
        out(b"c" + value.name.replace(" ", "\n").encode() + b"\n")
    elif isinstance(value, Storage):
        kind = f"torch {DTYPES[value.dtype].storage}" if value.dtype else "torch.storage UntypedStorage"
        dump(("storage", Global(kind), value.key, "cpu", value.elements))
        out(b"Q")
    elif isinstance(value, LazyTensor):
        _dump_tensor(value, key_of(value), call)
    elif isinstance(value, TorchValue):
        if value.kind == "dtype":
            dump(Global(f"torch {value.value}"))
        else:
            call(f"torch {value.kind}", value.value)
    elif isinstance(value, dict):
        _dump_dict(value, dump, call, out)
    elif isinstance(value, set):
        call("__builtin__ set", list(value))
    else:
        out(b"](" if isinstance(value, list) else b"(")
        dump(*value)
        out(b"e" if isinstance(value, list) else b"t")


def _dump_dict(
    value: dict[Any, Any], dump: Callable[..., None], call: Callable[..., None], out: Callable[[bytes], None]
) -> None:
    if isinstance(value, OrderedDict):
        call("collections OrderedDict")
    else:
        out(b"}")
    out(b"(")
    for key, item in dict.items(value):
        dump(key, item)
    out(b"u")
    if isinstance(value, OrderedDict) and hasattr(value, "_metadata"):
        dump({"_metadata": value._metadata})
        out(b"b")


def _dump_tensor(tensor: LazyTensor, key: str, call: Callable[..., None]) -> None:
    if tensor.parameter:
        plain = LazyTensor(tensor.dtype, tensor.shape, tensor.read, tensor.identity)
        call("torch._utils _rebuild_parameter", plain, tensor.requires_grad, OrderedDict())
        return
    stride = [1] * len(tensor.shape)
    for axis in reversed(range(len(stride) - 1)):
        stride[axis] = stride[axis + 1] * max(1, tensor.shape[axis + 1])
    item_bytes = DTYPES[tensor.dtype].item_bytes
    typed = DTYPES[tensor.dtype].storage is not None
    elements = tensor.bytes // item_bytes if typed else tensor.bytes
    storage = Storage(key, tensor.dtype if typed else None, elements)
    common: tuple[Any, ...] = (storage, 0, tensor.shape, tuple(stride), tensor.requires_grad, OrderedDict())
    if typed:
        call("torch._utils _rebuild_tensor_v2", *common)
    else:
        call("torch._utils _rebuild_tensor_v3", *common, TorchValue("dtype", tensor.dtype))
