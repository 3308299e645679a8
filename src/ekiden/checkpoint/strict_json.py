"""JSON from elsewhere, parsed without trusting it: bounded in size, depth and numbers, no key twice.

The manifest, the header of a tensor file and the JSON files of a checkpoint come through here. Python's
parser alone takes `NaN`, lets the last of two equal keys win, and ends in a RecursionError at a depth of
100,000.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 32
_MAX_INTEGER_CHARACTERS = 20  # of -2**63 and 2**64 - 1
# A string (its end optional: an open one must not be tried again from each of its quotes), or a bracket.
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


class Damaged(Exception):
    """A checkpoint that must not be used; the message says which file and why."""


class Unreadable(Damaged):
    """A checkpoint that cannot be read now (I/O error, no permission): perhaps whole, so not set aside."""


def parse_json(data: bytes, name: str, allow_nan: bool = False) -> Any:
    """Return the value of the JSON text `data` (UTF-8) of the file `name`.

    Args:
        allow_nan: take NaN and Infinity, which Python writes for such floats.

    Raises:
        Damaged: it is not JSON, a key stands twice, or it goes deeper than `MAX_DEPTH`.
    """
    try:
        _check_depth(data)
        return json.loads(
            data.decode("utf-8-sig"),  # of bytes it would take UTF-16 too
            parse_constant=float if allow_nan else _refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
            object_pairs_hook=_refuse_duplicates,
        )
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not valid JSON ({str(error)[:100]})") from None


def _check_depth(data: bytes) -> None:
    depth = 0
    for match in _BRACKETS.finditer(data):
        first = match[0][:1]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
        elif first in b"]}":
            depth -= 1


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is beyond a float")
    return value


def _bounded(text: str) -> int:
    if len(text) > _MAX_INTEGER_CHARACTERS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result
