"""The files of a mirror: how they are named, what is to be stored, what stands there, and what a place must be able to do.

`mirror_backends` and `mirror_hub` are such places; `mirror` and `mirror_state` give the files their meaning.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ekiden.checkpoint import files

FOLDER = re.compile(r"step-(\d{8,18})-([0-9a-f]{12})")
COMMIT = re.compile(FOLDER.pattern + r"\.json")


@dataclass(frozen=True)
class Source:
    """What is to be stored: size in bytes, SHA-256 in hex, and a file (its first `size` bytes) or the bytes."""

    size: int
    sha256: str
    path: Path | None = None
    data: bytes = b""

    @classmethod
    def of(cls, data: bytes) -> Source:
        """Return `data` as a source."""
        return cls(len(data), hashlib.sha256(data).hexdigest(), data=data)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes.

        Raises:
            OSError: the file cannot be read.
        """
        if self.path is None:
            yield self.data
        else:
            yield from files.read_chunks(self.path, self.size)


@dataclass(frozen=True)
class Entry:
    """A file that stands on the mirror: size in bytes; digest: what the server says of its bytes, or ''."""

    size: int
    digest: str = ""


class Backend(Protocol):
    """What a mirror needs of a place. Names are relative, with '/'. Any exception means that it did not work."""

    def listing(self) -> dict[str, Entry]:
        """Return the files there that have the names of a mirror; none where nothing was ever written."""
        ...

    def holds(self, name: str, entry: Entry, source: Source) -> bool:
        """Return whether the file listed as `entry` has the bytes of `source`, as far as can be told."""
        ...

    def put(self, sources: Mapping[str, Source]) -> None:
        """Store files; those of these names are replaced. Cut short, it may leave a torn one."""
        ...

    def publish(self, name: str, source: Source, commits: list[str], folders: list[str]) -> None:
        """Store the file `name`; only where it stands whole, remove what `remove` does."""
        ...

    def remove(self, commits: list[str], folders: list[str]) -> None:
        """Remove first the files `commits`, then the files in `folders`."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return at most `length` bytes from `offset` on; fewer only at the file's end."""
        ...


def is_ours(name: str) -> bool:
    """Return whether a mirror writes a file of this name; all others are left alone."""
    folder, slash, rest = name.partition("/")
    return bool(COMMIT.fullmatch(name) or (slash and rest and "/" not in rest and FOLDER.fullmatch(folder)))
