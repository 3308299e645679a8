"""Checkpoints in JSON, read lazily: what `json_format` writes, and what other tools write of the same kind.

Parsed JSON comes from `json_scan`, which leaves long strings and arrays of numbers in the file; here they become
tensors whose bytes are read when asked for. Every claim is compared with the data that is there before anything is
made of it.
"""

from __future__ import annotations

import binascii
import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekiden.checkpoint.data_pickle import DEVICE
from ekiden.checkpoint.json_scan import Part, scan_json
from ekiden.checkpoint.lazy import CHUNK_BYTES, DTYPES, LazyTensor, TorchValue, check_tree, rechunk
from ekiden.checkpoint.number_lists import read_numbers, shape_of
from ekiden.checkpoint.strict_json import Damaged, parse_json
from ekiden.errors import UserError

VERSION = 1
HEADER, ROOT, METADATA = "__ekiden__", "__value__", "__metadata__"
TENSOR_KEYS = {"dtype", "shape", "data"}
FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_STATE_NAMES = {"model", "state_dict", "model_state_dict", "model_state", "weights"}
_MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
_MAX_TEXT_BYTES = 64 << 20


def read_json(path: Path) -> Any:
    """Return what the JSON checkpoint at `path` holds, its tensors lazy.

    In a file of another tool, an object with dtype, shape and data is a tensor too, as numbers (nested or flat) or
    base64; and so is, as float32, an array of numbers under a key with a dot in it, as an optimizer's moment, or
    directly in an object named `model`, `state_dict`, `model_state_dict`, `model_state` or `weights`.

    Raises:
        UserError: it is not JSON, or claims what its data does not have.
    """
    raw = scan_json(path.resolve())
    decoder = _Decoder(path)
    if isinstance(raw, dict) and HEADER in raw:
        header = raw.pop(HEADER)
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise UserError(
                f"{path} is of a version of the format that this program does not read; update Ekiden"
            )
        decoder.take_ordered(header.get("ordered"))
        value = decoder.decode(raw[ROOT], (ROOT,)) if ROOT in raw else decoder.decode(raw, ())
    else:
        decoder.foreign = True
        value = decoder.decode(raw, ())
    check_tree(value, str(path))
    return value


class _Decoder:
    """Turns parsed JSON into values and lazy tensors; every claim is compared with the data that is there."""

    def __init__(self, path: Path) -> None:
        self.path, self.foreign = path, False
        self.ordered: dict[tuple[str | int, ...], dict[str, Any]] = {}
        self.tensors: list[LazyTensor] = []

    def wrong(self, path: tuple[str | int, ...], what: str) -> UserError:
        """Return the error for what stands at `path`."""
        place = "/".join(str(step) for step in path)[:120] or "its root"
        return UserError(f"{self.path}: {place} {what}; write it again from its source")

    def take_ordered(self, entries: Any) -> None:
        """Note from the header which dicts are OrderedDicts, and their metadata.

        Raises:
            UserError: the header's list is not one.
        """
        try:
            for index, entry in enumerate(entries):
                self.ordered[tuple(entry["path"])] = {**entry, "index": index}
        except (TypeError, KeyError):
            raise self.wrong((HEADER,), "is not well-formed") from None

    def decode(self, value: Any, path: tuple[str | int, ...], in_state: bool = False) -> Any:
        """Return the value that the JSON `value` at `path` stands for.

        Args:
            in_state: in a file of another tool, an array of numbers is a tensor here.

        Raises:
            UserError: a claim does not fit the data, or a tag that no version writes.
        """
        if isinstance(value, Part):
            return self._part(value, path, in_state)
        if isinstance(value, list):
            if in_state and _is_numbers(value):
                return self._list_tensor(json.dumps(value).encode(), path)
            return [self.decode(item, (*path, i)) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if value.keys() >= TENSOR_KEYS and isinstance(value["dtype"], str):
            return self._tensor(value, path)
        if not self.foreign:
            for tag in value:
                if tag.startswith("__"):
                    return self._tagged(tag, value, path)
        items = {
            key: self.decode(item, (*path, key), self._is_state(key, path)) for key, item in value.items()
        }
        return self._maybe_ordered(items, path)

    def _is_state(self, key: str, path: tuple[str | int, ...]) -> bool:
        """Return whether an array of numbers at `path`/`key` of another tool's file is a tensor."""
        last = path[-1] if path else ""
        return self.foreign and ("." in key or key in _MOMENTS or last in _STATE_NAMES)

    def _maybe_ordered(self, items: dict[Any, Any], path: tuple[str | int, ...]) -> dict[Any, Any]:
        entry = self.ordered.get(path)
        if entry is None:
            return items
        result = OrderedDict(items)
        if "metadata" in entry:
            metadata = self.decode(entry["metadata"], (METADATA, entry["index"]))
            result._metadata = metadata  # type: ignore[attr-defined]
        return result

    def _tagged(self, tag: str, value: dict[str, Any], path: tuple[str | int, ...]) -> Any:
        content, inside = value[tag], (*path, tag)
        if tag == "__same_as__":
            if type(content) is not int or not 0 <= content < len(self.tensors):
                raise self.wrong(path, "refers to a tensor that does not stand before it")
            first = self.tensors[content]
            return _flagged(first, value)
        if len(value) != 1:
            raise self.wrong(path, f"has keys beside {tag}")
        if tag == "__bytes__":
            return self._bytes(content, path)
        if isinstance(content, str):
            if tag == "__float__" and content in FLOATS:
                return FLOATS[content]
            if tag == "__dtype__" and content in DTYPES:
                return TorchValue("dtype", content)
            if tag == "__device__" and DEVICE.fullmatch(content):
                return TorchValue("device", content)
        if tag == "__Size__" and _is_lengths(content):
            return TorchValue("Size", tuple(content))
        content = self._small_list(content, path)
        if tag == "__dict__" and all(isinstance(pair, list) and len(pair) == 2 for pair in content):
            pairs = [
                (self.decode(key, (*inside, i, 0)), self.decode(item, (*inside, i, 1)))
                for i, (key, item) in enumerate(content)
            ]
            return self._maybe_ordered(self._hashed(dict, pairs, path), path)
        if tag in ("__tuple__", "__set__"):
            items = [self.decode(item, (*inside, i)) for i, item in enumerate(content)]
            return tuple(items) if tag == "__tuple__" else self._hashed(set, items, path)
        raise self.wrong(path, f"holds a {tag[:40]!r} that is unknown or not well-formed")

    def _hashed(self, kind: Any, items: list[Any], path: tuple[str | int, ...]) -> Any:
        try:
            return kind(items)
        except TypeError:
            raise self.wrong(path, "has a key that cannot be one") from None

    def _small_list(self, content: Any, path: tuple[str | int, ...]) -> list[Any]:
        if isinstance(content, Part) and not content.is_string:
            content = self._part(content, path, False)
        if not isinstance(content, list):
            raise self.wrong(path, "is not well-formed")
        return content

    def _text(self, value: Any, path: tuple[str | int, ...]) -> str:
        if isinstance(value, Part) and value.is_string and value.length <= _MAX_TEXT_BYTES:
            try:
                value = json.loads(b'"' + b"".join(value.read()) + b'"')
            except ValueError:
                raise self.wrong(path, "is not a string of JSON") from None
        if not isinstance(value, str):
            raise self.wrong(path, "is not a string, or one that is too long")
        return value

    def _bytes(self, value: Any, path: tuple[str | int, ...]) -> bytes:
        try:
            return binascii.a2b_base64(self._text(value, path), strict_mode=True)
        except ValueError:
            raise self.wrong(path, "is not base64") from None

    def _part(self, part: Part, path: tuple[str | int, ...], in_state: bool) -> Any:
        """Return the value of a long part that is not a tensor's data."""
        if part.is_string:
            return self._text(part, path)
        if in_state:
            return self._list_tensor(part, path)
        if part.length > _MAX_TEXT_BYTES // 4:
            raise self.wrong(path, f"is an array of {part.length} bytes outside a tensor")
        try:
            return parse_json(b"".join(part.read()), self.path.name)
        except Damaged:
            raise self.wrong(path, "is not an array of numbers") from None

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _tensor(self, value: dict[str, Any], path: tuple[str | int, ...]) -> LazyTensor:
        dtype, shape, data = value["dtype"].removeprefix("torch."), value["shape"], value["data"]
        if dtype not in DTYPES:
            raise self.wrong(path, f"is a tensor of dtype {dtype[:30]!r}, which is unknown")
        if not _is_lengths(shape):
            raise self.wrong(path, f"is a tensor of shape {str(shape)[:60]}, which cannot be")
        elements = math.prod(shape)
        needed = elements * DTYPES[dtype].item_bytes
        where = f"{self.path}: {'/'.join(map(str, path))[:120]}"
        if isinstance(data, str) or (isinstance(data, Part) and data.is_string):
            length = data.length if isinstance(data, Part) else len(data)
            if length != (needed + 2) // 3 * 4:
                raise self.wrong(
                    path,
                    f"has {length} characters of base64, and its shape {shape} of {dtype} needs {(needed + 2) // 3 * 4}",
                )
            source = data if isinstance(data, Part) else data.encode("ascii", "replace")

            def read() -> Iterator[bytes]:
                return _from_base64(source, needed, where)

        else:
            text = data if isinstance(data, Part) else self._numbers_text(data, dtype, path)
            length = text.length if isinstance(text, Part) else len(text)
            # The shortest number takes one character, and a comma or bracket.
            if length < 2 * elements:
                raise self.wrong(path, f"has {length} characters of numbers, too few for its shape {shape}")

            def read() -> Iterator[bytes]:
                return _of_length(read_numbers(_open(text), dtype, where, tuple(shape)), needed, where)

        return self._add(LazyTensor(dtype, tuple(shape), read, object()), value)

    def _numbers_text(self, data: Any, dtype: str, path: tuple[str | int, ...]) -> bytes:
        """Return short data again as JSON, as the data of a long tensor stands in the file."""
        data = data if isinstance(data, list) else [data]
        if data and not _is_numbers(data):
            raise self.wrong(path, "is a tensor whose data is neither base64 nor numbers")
        text = json.dumps(data).encode()
        return text.replace(b"true", b"1").replace(b"false", b"0") if dtype == "bool" else text

    def _list_tensor(self, text: Part | bytes, path: tuple[str | int, ...]) -> LazyTensor:
        """Return a bare array of numbers as a tensor of float32."""
        where = f"{self.path}: {'/'.join(map(str, path))[:120]}"
        shape = shape_of(_open(text), where)
        return self._add(
            LazyTensor("float32", shape, lambda: read_numbers(_open(text), "float32", where), object()), {}
        )

    def _add(self, tensor: LazyTensor, value: dict[str, Any]) -> LazyTensor:
        self.tensors.append(_flagged(tensor, value))
        return self.tensors[-1]


def _flagged(tensor: LazyTensor, value: dict[str, Any]) -> LazyTensor:
    grad, parameter = value.get("requires_grad") is True, value.get("parameter") is True
    return LazyTensor(tensor.dtype, tensor.shape, tensor.read, tensor.identity, grad, parameter)


def _is_lengths(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**48 for n in value)
    )


def _is_numbers(value: list[Any]) -> bool:
    return bool(value) and all(
        _is_numbers(item) if isinstance(item, list) else type(item) in (int, float, bool) for item in value
    )


def _open(text: Part | bytes) -> Iterator[bytes]:
    return iter([text]) if isinstance(text, bytes) else text.read()


def _from_base64(source: Part | bytes, needed: int, where: str) -> Iterator[bytes]:
    """Yield the bytes that base64 text stands for; only its end may be padded."""
    try:
        for text in rechunk(_open(source), CHUNK_BYTES // 3 * 4):
            chunk = binascii.a2b_base64(text, strict_mode=True)
            needed -= len(chunk)
            yield chunk
    except binascii.Error:
        raise UserError(f"{where} is not base64; write it again from its source") from None
    if needed:
        raise UserError(f"{where} has padding within its base64; write it again from its source")


def _of_length(chunks: Iterator[bytes], needed: int, where: str) -> Iterator[bytes]:
    left = needed
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left:
        raise UserError(
            f"{where} does not hold as many numbers as its shape says; write it again from its source"
        )
