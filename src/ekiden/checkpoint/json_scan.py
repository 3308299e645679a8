"""Large JSON files read with little memory: a copy without the long parts, and where those lie.

One pass over the file cuts out every string and every array of numbers that is longer than a few hundred bytes, and
leaves a reference in its place. The rest is small and goes through the strict parser of `strict_json`; `json_format`
reads the parts one after the other when their tensors are wanted.

A streaming parser would do the same in theory; measured on one string of 268 MB (a tensor of 201 MB), ijson 3.6 takes
525 MB of memory and 21 s (its C backend) or 789 MB and 8 s (Python), since the string becomes one token.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.checkpoint.lazy import MAX_DIMENSIONS, MAX_VALUES, read_range
from ekiden.checkpoint.strict_json import Damaged, parse_json
from ekiden.errors import UserError

LONG_BYTES = 512
MAX_REST_BYTES = 64 << 20
MAX_UNDECIDED_BYTES = 16 << 20
_ESCAPED = re.compile(rb'(?:[^"\\]|\\.)*+', re.DOTALL)
_OPENING = re.compile(rb'["\[]')
_NOT_A_NUMBER = re.compile(rb"[^0-9+\-.eE,\s]")
_OUTSIDE, _STRING, _NUMBERS = range(3)


@dataclass(frozen=True)
class Part:
    """A long string, or a long array of numbers and arrays, that stays in the file.

    offset, length (bytes): without the quotes of a string, with the brackets of an array.
    """

    path: Path
    is_string: bool
    offset: int
    length: int

    def read(self) -> Iterator[bytes]:
        """Yield its bytes."""
        return read_range(self.path, self.offset, self.length)


def scan_json(path: Path) -> Any:
    """Return the value of the JSON file `path`, its long strings and long arrays of numbers as `Part`s.

    Raises:
        UserError: it is not JSON, is cut short, a key stands twice, or it is not made of tensors and small values.
    """
    scan = _Scan(path)
    try:
        for chunk in files.read_chunks(path):
            scan.feed(chunk)
        rest = scan.finish()
        value = parse_json(rest, path.name)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({files.reason(error)}); mend that and try again") from None
    except Damaged as damage:
        raise UserError(f"{path} is not taken: {damage}; write it again from its source") from None
    return scan.resolve(value)


class _Scan:
    """The state between two chunks of the file: what is being read, and where it began."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rest = bytearray()
        self.parts: list[Part] = []
        # No file can contain what is drawn only now, so no string of it is taken for a reference.
        self.prefix = f"part-{secrets.token_hex(16)}-"
        self.base = self.carry = 0
        self.state, self.start, self.depth = _OUTSIDE, 0, 0
        self.chunk = b""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the file."""
        self.chunk, position = chunk, self.carry
        while position < len(chunk):
            if self.state == _OUTSIDE:
                position = self._outside(position)
            elif self.state == _STRING:
                position = self._string(position)
            else:
                position = self._numbers(position)
        self.carry = position - len(chunk)
        self.base += len(chunk)
        # Before anything is parsed: `{},` is 3 bytes in the file and 72 in memory.
        if len(self.rest) > MAX_REST_BYTES or self.rest.count(b",") + self.rest.count(b":") > 2 * MAX_VALUES:
            raise UserError(
                f"{self.path} holds more than {MAX_REST_BYTES >> 20} MB or {2 * MAX_VALUES} values beside its tensors; it "
                "is not a checkpoint in JSON"
            )

    def _outside(self, position: int) -> int:
        match = _OPENING.search(self.chunk, position)
        end = match.start() if match else len(self.chunk)
        self.rest += self.chunk[position:end]
        if match:
            self.state = _STRING if match[0] == b'"' else _NUMBERS
            self.start, self.depth = self.base + end, 0
            return end + 1 if self.state == _STRING else end
        return end

    def _string(self, position: int) -> int:
        # Two searches at the speed of memory; what has backslashes is stepped through, once.
        quote = self.chunk.find(b'"', position)
        end = quote if quote >= 0 else len(self.chunk)
        backslash = self.chunk.find(b"\\", position, end)
        if backslash >= 0:
            inside = _ESCAPED.match(self.chunk, backslash)
            end = inside.end() if inside else backslash
        if end == len(self.chunk):
            return end
        if self.chunk[end : end + 1] == b"\\":
            return end + 2  # what it escapes is in the next chunk
        self._end(end + 1, is_string=True)
        return end + 1

    def _numbers(self, position: int) -> int:
        match = _NOT_A_NUMBER.search(self.chunk, position)
        if match is None:
            return len(self.chunk)
        if match[0] == b"[":
            self.depth += 1
            if self.depth > MAX_DIMENSIONS:
                raise UserError(
                    f"{self.path} has at byte {self.start} lists within lists, more than {MAX_DIMENSIONS} deep; it is no "
                    "checkpoint in JSON"
                )
        elif match[0] == b"]":
            self.depth -= 1
            if self.depth == 0:
                self._end(match.end(), is_string=False)
        else:
            # It was no array of numbers alone: its beginning is ordinary text, the rest is looked at anew.
            self._copy(self.base + match.start())
            return match.start()
        return match.end()

    def _end(self, end: int, is_string: bool) -> None:
        """Finish a string or array at `end` in this chunk: a reference if it is long, else as it is."""
        length = self.base + end - self.start
        if length <= LONG_BYTES:
            self._copy(self.base + end)
            return
        self.rest += f'"{self.prefix}{len(self.parts)}"'.encode()
        quotes = 1 if is_string else 0
        self.parts.append(Part(self.path, is_string, self.start + quotes, length - 2 * quotes))
        self.state = _OUTSIDE

    def _copy(self, end: int) -> None:
        """Copy the bytes of the file from `start` to `end` as they are."""
        if end - self.start > MAX_UNDECIDED_BYTES:
            raise UserError(
                f"{self.path} has at byte {self.start} an array of numbers that is not one to its end (NaN and Infinity "
                "are not JSON); write it again from its source"
            )
        if self.start >= self.base:
            self.rest += self.chunk[self.start - self.base : end - self.base]
        else:
            self.rest += b"".join(read_range(self.path, self.start, end - self.start))
        self.state = _OUTSIDE

    def finish(self) -> bytes:
        """Return the file without its long parts.

        Raises:
            UserError: the file ends within a string or array.
        """
        if self.state != _OUTSIDE or self.carry:
            raise UserError(f"{self.path} is cut short; copy it again from where it was written")
        return bytes(self.rest)

    def resolve(self, value: Any) -> Any:
        """Return `value` with the references replaced by their parts."""
        if isinstance(value, str) and value.startswith(self.prefix):
            return self.parts[int(value.removeprefix(self.prefix))]
        if isinstance(value, dict):
            for key in value:
                if key.startswith(self.prefix):
                    raise UserError(f"{self.path} has a name longer than {LONG_BYTES} bytes; it is not taken")
            return {key: self.resolve(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(item) for item in value]
        return value
