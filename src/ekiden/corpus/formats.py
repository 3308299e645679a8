"""The files that a corpus may consist of: their formats, by name, and what is known of each before it is read.

`sources` and `hub` find them, on disks and on the hub; `documents` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
_COMPRESSED = (".gz", ".zst", ".parquet")


@dataclass(frozen=True)
class SourceFile:
    """One file: where it is, its size in bytes, one of FORMATS, its name below the corpus (for saying, and identity)."""

    path: str
    size: int
    format: str
    name: str = ""


def file_format(path: Path) -> str | None:
    """Return the format of a file by its name; None: not one that is read."""
    return next((suffix for suffix in FORMATS if path.name.endswith(suffix)), None)


def is_compressed(path: str) -> bool:
    """Return whether a file can only be read as a whole, from its beginning."""
    return path.endswith(_COMPRESSED)
