"""The account of a corpus: every record read is either a document or counted under the reason why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ekiden.corpus.formats import is_compressed

EXAMPLES = 3
"""Places kept for each reason."""


@dataclass
class Ledger:
    """Counts of one language (or one part of it).

    Attributes:
        read: records met. kept: documents they yielded. rejected: records by reason; read == kept + sum(rejected).
        divided: documents more than texts kept, where long texts were divided.
        examples: the first few (file, byte offset) by reason.
        accept: called with (text, file, place) of every document before it is kept; returns the text as it is kept, or
            raises `documents.Rejected`. None: all are kept as they are.
        position: input bytes read of the part being read; for progress, no part of the account.
    """

    read: int = 0
    kept: int = 0
    divided: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    position: int = field(default=0, compare=False)
    accept: Callable[[str, str, int], str] | None = field(default=None, compare=False, repr=False)

    def accepted(self, text: str, file: str, place: int) -> str:
        """Return the text as it is kept.

        Raises:
            Rejected: it is not kept.
        """
        return text if self.accept is None else self.accept(text, file, place)

    def keep(self) -> None:
        """Count a document."""
        self.read += 1
        self.kept += 1

    def reject(self, reason: str, file: str, offset: int) -> None:
        """Count a record that is no document."""
        self.read += 1
        self.rejected[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append((file, offset))

    def add(self, other: Ledger) -> None:
        """Take over the counts of a later part."""
        self.read += other.read
        self.kept += other.kept
        self.divided += other.divided
        self.rejected.update(other.rejected)
        for reason, places in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += places[: EXAMPLES - len(mine)]

    def as_dict(self) -> dict[str, Any]:
        """Return the ledger as JSON values."""
        return {
            "read": self.read,
            "kept": self.kept,
            "divided": self.divided,
            "rejected": dict(self.rejected),
            "examples": self.examples,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Ledger:
        """Return the ledger that `as_dict` wrote."""
        examples = {
            reason: [(file, offset) for file, offset in places]
            for reason, places in value["examples"].items()
        }
        return cls(value["read"], value["kept"], value["divided"], Counter(value["rejected"]), examples)

    def describe(self) -> list[str]:
        """Return a line for each reason: count and where the first ones are, as file:line."""
        lines = []
        for reason, count in sorted(self.rejected.items()):
            places = ", ".join(place(file, offset) for file, offset in self.examples.get(reason, []))
            lines.append(f"{count:,} rejected: {reason} ({places})")
        if self.divided:
            lines.append(f"long texts were divided: {self.divided:,} documents more than texts")
        return lines


def place(file: str, offset: int) -> str:
    """Return 'file:line' for a byte offset; the offset itself where the file is not there any more."""
    try:
        return f"{file}:{line_number(file, offset)}"
    except OSError:
        return f"{file} at byte {offset}"


def line_number(file: str, offset: int) -> int:
    """Return the 1-based line (for a compressed file: record) at byte `offset` of `file`.

    Counted only for the few examples shown: a worker that starts in the middle of a file does not know it.
    """
    if is_compressed(file):
        return offset
    line = 1
    with open(file, "rb") as data:  # noqa: PTH123 - a plain byte count
        while offset > 0 and (block := data.read(min(offset, 1 << 20))):
            line += block.count(b"\n")
            offset -= len(block)
    return line
