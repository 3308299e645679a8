"""Tensors as plain lists of numbers in JSON: three times the size of base64, and readable by eye.

`json_format` writes them with `--readable` and reads them, nested or flat, also as other tools write them. Text is
taken apart in pieces of a few MB, so that a list of a billion numbers needs no more memory than one of a million.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import orjson

from ekiden.checkpoint.lazy import DTYPES, LazyTensor, rechunk
from ekiden.errors import UserError

_PIECE_BYTES = 1 << 20
_TOKENS = re.compile(rb"[\[\]]|[^\[\]]+")
_UNSIGNED = {
    "bool": np.uint8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}
_SIGNED = {"int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64}
_INTEGERS = _UNSIGNED | _SIGNED
_FLOATS = {"float16": np.float16, "bfloat16": np.float32, "float32": np.float32, "float64": np.float64}


def numbers(tensor: LazyTensor) -> Iterator[bytes] | None:
    """Return the elements as JSON numbers with commas between, in pieces; None where JSON has no numbers for them.

    A value parsed as a double and rounded to the element type is the same value to the last bit. NaN, infinities,
    complex and 8-bit floating types have no such numbers.
    """
    if tensor.dtype not in _FLOATS and tensor.dtype not in _INTEGERS:
        return None
    if tensor.dtype in _FLOATS and any(not np.isfinite(part).all() for part in _arrays(tensor)):
        return None
    return _pieces(tensor)


def _pieces(tensor: LazyTensor) -> Iterator[bytes]:
    comma = b""
    for array in _arrays(tensor):
        yield comma + _text(array)
        comma = b","


def _arrays(tensor: LazyTensor) -> Iterator[np.ndarray]:
    item = DTYPES[tensor.dtype].item_bytes
    for raw in rechunk(tensor.read(), _PIECE_BYTES // item * item):
        if tensor.dtype == "bfloat16":
            yield (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            yield np.frombuffer(raw, (_FLOATS | _INTEGERS)[tensor.dtype])


def _text(array: np.ndarray) -> bytes:
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    text = orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    if array.dtype == np.float32:
        # The shortest digits that tell floats apart, read as a double, may round to a neighbour; all digits do not.
        back = np.array(orjson.loads(text), np.float64).astype(np.float32)
        if back.tobytes() != array.tobytes():
            text = orjson.dumps(array.astype(np.float64), option=orjson.OPT_SERIALIZE_NUMPY)
    return text[1:-1]


@dataclass
class _Shape:
    """What is known of a nested list while it is read: lengths by depth, and how far each open list has come."""

    where: str
    lengths: dict[int, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    depth: int = 0

    def count(self, number: int, is_list: bool) -> None:
        """Count items of the innermost open list: `number` numbers, or lists.

        Raises:
            UserError: there are both, or no list is open.
        """
        if not self.counts or (self.depth and (len(self.counts) == self.depth) == is_list):
            raise UserError(f"{self.where} mixes numbers and lists; write it again from its source")
        if not is_list:
            self.depth = len(self.counts)
        self.counts[-1] += number

    def close(self) -> None:
        """End the innermost open list.

        Raises:
            UserError: the lists of its depth before it were of another length.
        """
        length, level = self.counts.pop(), len(self.counts)
        if self.lengths.setdefault(level, length) != length:
            raise UserError(
                f"{self.where} has rows of {self.lengths[level]} and of {length} numbers; write it again from its source"
            )

    def shape(self) -> tuple[int, ...]:
        """Return the lengths by depth."""
        return tuple(self.lengths[level] for level in range(len(self.lengths)))


def read_numbers(
    text: Iterator[bytes], dtype: str, where: str, expected: tuple[int, ...] | None = None
) -> Iterator[bytes]:
    """Yield the elements of a nested or flat JSON array of numbers as little-endian bytes of `dtype`.

    Args:
        expected: the shape that a nested array must have.

    Raises:
        UserError: a number that the type cannot hold, a list that is not one, or another shape than expected.
    """
    shape = _Shape(where)
    for values in _values(text, shape):
        yield _convert(values, dtype, where)
    found = shape.shape()
    if expected is not None and len(found) > 1 and found != expected:
        raise UserError(
            f"{where} has the shape {list(expected)}, and its numbers {list(found)}; write it again from its source"
        )


def shape_of(text: Iterator[bytes], where: str) -> tuple[int, ...]:
    """Return the lengths of a nested JSON array of numbers, outermost first.

    Raises:
        UserError: its rows differ in length, or it is not one.
    """
    shape = _Shape(where)
    for _ in _values(text, shape):
        pass
    return shape.shape()


def _values(text: Iterator[bytes], shape: _Shape) -> Iterator[list[int | float]]:
    """Yield the numbers in runs, keeping `shape`."""
    pending, before = b"", b"["
    for chunk in text:
        data = pending + chunk
        # A number may go on in the next chunk; the last bracket or comma ends one for certain.
        cut = max(data.rfind(b","), data.rfind(b"]"), data.rfind(b"[")) + 1
        pending = data[cut:]
        for token in _TOKENS.findall(data[:cut]):
            if token == b"[":
                if before == b"]":
                    raise UserError(f"{shape.where} lacks a comma; write it again from its source")
                if shape.counts:
                    shape.count(1, is_list=True)
                shape.counts.append(0)
            elif token == b"]":
                if not shape.counts or before == b",":
                    raise UserError(f"{shape.where} is not a list of numbers; write it again from its source")
                shape.close()
            elif values := _run(token, before, shape):
                yield values
            stripped = token.strip()
            before = stripped[-1:] or before
    if pending.strip() or shape.counts:
        raise UserError(f"{shape.where} ends within a list; copy it again")


def _run(token: bytes, before: bytes, shape: _Shape) -> list[int | float]:
    """Return the numbers of a text between two brackets or chunks."""
    text = token.strip()
    if not text:
        return []
    wrong = UserError(f"{shape.where} is not a list of numbers; write it again from its source")
    if text.startswith(b","):
        if before not in (b"]",) and not before.isdigit():
            raise wrong
        text = text[1:].strip()
    elif before == b"]":
        raise wrong
    text = text.removesuffix(b",")
    if not text:
        return []
    try:
        values: list[int | float] = orjson.loads(b"[" + text + b"]")
    except orjson.JSONDecodeError:
        raise wrong from None
    shape.count(len(values), is_list=False)
    return values


def _convert(values: list[int | float], dtype: str, where: str) -> bytes:
    if dtype in _INTEGERS:
        if not all(type(value) is int for value in values):
            raise UserError(
                f"{where} holds fractions, and its dtype is {dtype}; write it again from its source"
            )
        try:
            array = np.array(values, _INTEGERS[dtype])
        except OverflowError:
            raise UserError(
                f"{where} holds a number that {dtype} cannot hold; write it again from its source"
            ) from None
        if dtype == "bool" and array.max(initial=0) > 1:
            raise UserError(f"{where} is of dtype bool and holds other numbers than 0 and 1")
        return array.tobytes()
    if dtype not in _FLOATS:
        raise UserError(f"{where} is of dtype {dtype}, which is read from base64 only; write it again so")
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, np.float64).astype(_FLOATS[dtype])
    except OverflowError:
        array = np.array([np.inf])
    if not np.isfinite(array).all():
        raise UserError(f"{where} holds a number beyond {dtype}; write it again from its source")
    if dtype == "bfloat16":
        return _round_to_bfloat16(array)
    return array.tobytes()


def _round_to_bfloat16(array: np.ndarray) -> bytes:
    """Return float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
