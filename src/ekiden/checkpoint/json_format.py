"""Checkpoints as JSON: any parser reads them, and every bit comes back.

A tensor is `{"dtype": "float32", "shape": [2, 3], "data": "..."}`, the data base64 of its little-endian elements, row by
row: 4/3 of their size. Values around tensors are JSON's own; what JSON has not stands in an object with one key:

    {"__float__": "NaN"}           also "Infinity" and "-Infinity"; tensors keep theirs in their bytes
    {"__tuple__": [...]}           a tuple; {"__set__": [...]}; {"__bytes__": BASE64}
    {"__dict__": [[key, value]]}   a dict with keys that are not strings, or that could be taken for one of these
    {"__Size__": [...]}            torch.Size; {"__dtype__": "float32"}; {"__device__": "cuda:0"}
    {"__same_as__": 3}             the very tensor that stands fourth in the file (tied weights are kept once)

The first key of the file is "__ekiden__": the version of this format, and which objects are OrderedDicts. `convert`
writes and reads such files; `load_json_checkpoint` returns what torch.load would.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any, BinaryIO

from ekiden.checkpoint import files
from ekiden.checkpoint.json_reader import HEADER, METADATA, ROOT, TENSOR_KEYS, VERSION, read_json
from ekiden.checkpoint.json_scan import LONG_BYTES
from ekiden.checkpoint.lazy import (
    CHUNK_BYTES,
    LazyTensor,
    TorchValue,
    check_tree,
    load_tree,
    rechunk,
)
from ekiden.checkpoint.number_lists import numbers
from ekiden.checkpoint.strict_json import MAX_DEPTH as MAX_JSON_DEPTH
from ekiden.errors import UserError

_MAX_JSON_DEPTH = MAX_JSON_DEPTH - 4  # what a tensor and the root add


def load_json_checkpoint(path: str | Path) -> Any:
    """Return what the JSON checkpoint at `path` holds, as `torch.load` would return it.

    Raises:
        UserError: it is not JSON, cut short, or claims shapes that its data does not have.
    """
    return load_tree(read_json(Path(path)))


# -- writing -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any, readable: bool = False) -> None:
    """Write `value`, a tree with lazy tensors, as JSON, with one chunk of one tensor in memory at a time.

    Args:
        readable: write tensors as lists of numbers, where their values are such.

    Raises:
        UserError: it holds something that cannot be kept.
        OSError: the disk is full or fails.
    """
    check_tree(value, "the checkpoint")
    encoder = _Encoder()
    encoded = encoder.encode(value, ())
    header = {"format": "checkpoint", "version": VERSION, "ordered": encoder.ordered}
    plain_root = isinstance(value, dict) and isinstance(encoded, dict) and "__dict__" not in encoded
    if not plain_root:
        # The root stands one level lower then, and so do the paths.
        for entry in encoder.ordered:
            if entry["path"][:1] != [METADATA]:
                entry["path"] = [ROOT, *entry["path"]]
        encoded = {ROOT: encoded}
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        _write(file, {HEADER: header} | encoded, readable)
        file.write(b"\n")


class _Encoder:
    """Turns values into what JSON has, leaving the tensors for the writer."""

    def __init__(self) -> None:
        self.ordered: list[dict[str, Any]] = []
        self.seen: dict[Hashable, int] = {}

    def encode(self, value: Any, path: tuple[str | int, ...]) -> Any:
        """Return what stands for `value` at `path` in the file: JSON values, tagged dicts, and tensors as they are.

        Raises:
            UserError: nested deeper than JSON is read.
        """
        if len(path) > _MAX_JSON_DEPTH:
            raise UserError(
                f"the checkpoint is nested deeper than JSON is read ({_MAX_JSON_DEPTH} levels); save it flatter"
            )
        if isinstance(value, LazyTensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, list):
            return [self.encode(item, (*path, i)) for i, item in enumerate(value)]
        if isinstance(value, (tuple, set)):
            tag = "__tuple__" if isinstance(value, tuple) else "__set__"
            return {tag: [self.encode(item, (*path, tag, i)) for i, item in enumerate(value)]}
        if isinstance(value, float) and not math.isfinite(value):
            name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
            return {"__float__": name}
        if isinstance(value, bytes):
            return {"__bytes__": base64.b64encode(value).decode()}
        if isinstance(value, TorchValue):
            return {f"__{value.kind}__": value.value}
        return value

    def _tensor(self, tensor: LazyTensor) -> Any:
        if tensor.identity in self.seen:
            flags = {"requires_grad": tensor.requires_grad, "parameter": tensor.parameter}
            return {"__same_as__": self.seen[tensor.identity], **{k: True for k, on in flags.items() if on}}
        self.seen[tensor.identity] = len(self.seen)
        return tensor

    def _dict(self, value: dict[Any, Any], path: tuple[str | int, ...]) -> Any:
        keys = list(dict.keys(value))
        plain = all(
            isinstance(key, str) and not key.startswith("__") and len(_json(key)) <= LONG_BYTES
            for key in keys
        )
        plain = plain and not set(keys) >= TENSOR_KEYS
        if isinstance(value, OrderedDict):
            entry: dict[str, Any] = {"path": list(path)}
            self.ordered.append(entry)
            if hasattr(value, "_metadata"):
                if check_tree(value._metadata, "the _metadata of an OrderedDict"):
                    raise UserError("the _metadata of an OrderedDict holds tensors; save it without them")
                entry["metadata"] = self.encode(value._metadata, (METADATA, len(self.ordered) - 1))
        if plain:
            return {key: self.encode(item, (*path, key)) for key, item in dict.items(value)}
        pairs = [
            [self.encode(key, (*path, "__dict__", i, 0)), self.encode(item, (*path, "__dict__", i, 1))]
            for i, (key, item) in enumerate(dict.items(value))
        ]
        return {"__dict__": pairs}


def _write(file: BinaryIO, value: Any, readable: bool) -> None:
    if isinstance(value, LazyTensor):
        _write_tensor(file, value, readable)
    elif isinstance(value, dict):
        file.write(b"{")
        for i, (key, item) in enumerate(value.items()):
            file.write((",\n" if i else "").encode() + _json(key) + b":")
            _write(file, item, readable)
        file.write(b"}")
    elif isinstance(value, list):
        file.write(b"[")
        for i, item in enumerate(value):
            file.write(b"," if i else b"")
            _write(file, item, readable)
        file.write(b"]")
    else:
        file.write(_json(value))


def _json(value: Any) -> bytes:
    """Return one value as JSON; half of a surrogate pair, which is no character, stays an escape."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False).encode()


def _write_tensor(file: BinaryIO, tensor: LazyTensor, readable: bool) -> None:
    fields: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    fields |= {"requires_grad": True} if tensor.requires_grad else {}
    fields |= {"parameter": True} if tensor.parameter else {}
    file.write(json.dumps(fields)[:-1].encode() + b', "data": ')
    pieces = numbers(tensor) if readable else None
    if pieces is not None:
        file.write(b"[")
        file.writelines(pieces)
        file.write(b"]}")
        return
    file.write(b'"')
    for chunk in rechunk(tensor.read(), CHUNK_BYTES):
        file.write(binascii.b2a_base64(chunk, newline=False))
    file.write(b'"}')
