"""Duplicates out of a build: a first reading sketches every document, then it is decided which are left out.

`sketch_unit` runs in a worker and leaves `UNIT.sketch` (21 bytes a document, 149 for near duplicates) beside the
receipts; `decide` reads them all, in order, and leaves `UNIT.drop` (a byte a document) for the second reading, which is
the build itself; whatever a killed build has finished of this stays. 20 million documents (about 20 GB) are 0.4 GB of
sketches on the disk for exact duplicates and 3.0 GB for near ones, and 24 and about 40 bytes a document in memory.

A document of the test split must not be trained on. Equal texts have equal hashes, so within a language they are in the
same split; but a small language keeps a larger share for evaluation, and a text that stands in two languages could be
in the test split of one and the training split of the other. Where duplicates are not removed anyway, workers note the
few documents for which that is possible (`Window`), and `leaks` has those units that hold one built again without it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ekiden.checkpoint import files
from ekiden.corpus.cleaning import TEST_ELSEWHERE, Cleaner, Sketches, duplicates, sketch, sketch_type
from ekiden.corpus.documents import read_documents
from ekiden.corpus.ledger import Ledger
from ekiden.progress import Progress, say
from ekiden.tokens.units import Settings, Unit, split_of

BATCH_BYTES = 1 << 20
"""Text sketched in one call."""

DECIDED = "decided.json"
_WINDOW = np.dtype([("hash", "<u8", (2,)), ("number", "<u4"), ("test", "u1")])


def remove_duplicates(units: list[Unit], settings: Settings, receipts: Path, pool: Executor) -> float:
    """Have every unit sketched, leave what to drop, and return the share of the text's bytes that stays."""
    decided = receipts / DECIDED
    if not decided.exists():
        sketch_units(units, settings, receipts, pool)
        share = decide(units, settings, receipts)
        files.write_atomic(decided, json.dumps({"kept": share}).encode())
    for unit in units:
        (receipts / f"{unit.name}.sketch").unlink(missing_ok=True)
    return float(json.loads(decided.read_bytes())["kept"])


def sketch_units(units: list[Unit], settings: Settings, receipts: Path, pool: Executor) -> None:
    """Sketch every unit that is not sketched yet, in the workers of `pool`."""
    todo = [unit for unit in units if not (receipts / f"{unit.name}.sketch").exists()]
    total, left = sum(unit.bytes for unit in units), sum(unit.bytes for unit in todo)
    futures = {pool.submit(sketch_unit, unit, settings, receipts): unit for unit in todo}
    with Progress(total, "B", "duplicates", initial=total - left) as progress:
        for future in as_completed(futures):
            future.result()
            progress.update(futures[future].bytes)


def sketch_unit(unit: Unit, settings: Settings, receipts: Path) -> None:
    """Write the sketches of a unit's documents, in order. Runs in a worker."""
    near, share = settings.cleaning.dedupe == "near", settings.test_split[unit.language]
    temporary = receipts / f".{unit.name}-{secrets.token_hex(4)}.sketch.tmp"
    with temporary.open("wb") as file:
        for texts in _batches(unit, settings):
            are_test = [split_of(text.encode(), share) == "test" for text in texts]
            file.write(sketch(texts, are_test, near).tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(receipts / f"{unit.name}.sketch")


def _batches(unit: Unit, settings: Settings) -> Iterator[list[str]]:
    ledger = Ledger(accept=Cleaner(settings.cleaning))
    batch: list[str] = []
    size = 0
    for part in unit.parts:
        for text in read_documents(part.file, ledger, part.start, part.end, settings.txt_documents):
            batch.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def decide(units: list[Unit], settings: Settings, receipts: Path) -> float:
    """Write the documents to drop of every unit, and return the share of the text's bytes that stays."""
    near = settings.cleaning.dedupe == "near"
    sketches = Sketches([receipts / f"{unit.name}.sketch" for unit in units], sketch_type(near))
    verdict = duplicates(sketches, near)
    for unit, drop in zip(units, sketches.cut(verdict)):
        files.write_atomic(receipts / f"{unit.name}.drop", drop.tobytes())
    sizes = sketches.column("bytes").astype(np.int64)
    say(f"{np.count_nonzero(verdict):,} of {len(verdict):,} documents are duplicates")
    return float(sizes[verdict == 0].sum() / max(1, sizes.sum())) or 1.0


def dropped(unit: Unit, receipts: Path) -> np.ndarray | None:
    """Return a code for each of a unit's documents, as `Cleaner` takes it; None: nothing was decided."""
    try:
        return np.fromfile(receipts / f"{unit.name}.drop", dtype=np.uint8)
    except FileNotFoundError:
        return None


class Window:
    """The documents of a unit that are test documents, or would be in another language with the same text.

    At most the largest test share of the documents, 21 bytes each.
    """

    def __init__(self, settings: Settings) -> None:
        shares = set(settings.test_split.values())
        self.needed = len(shares) > 1 and settings.cleaning.dedupe is None
        self._below = int(max(shares) * 2**64)
        self._rows: list[tuple[Any, int, bool]] = []

    def note(self, data: bytes, number: int, is_test: bool) -> None:
        """Note a document, the `number`-th of its unit, where it matters."""
        if self.needed and xxhash.xxh3_64_intdigest(data) < self._below:
            digest = np.frombuffer(xxhash.xxh3_128_digest(data), dtype="<u8")
            self._rows.append((digest, number, is_test))

    def save(self, unit: Unit, receipts: Path) -> None:
        """Write them beside the receipts."""
        if self.needed:
            files.write_atomic(
                receipts / f"{unit.name}.window", np.array(self._rows, dtype=_WINDOW).tobytes()
            )


def leaks(units: list[Unit], receipts: Path) -> list[Unit]:
    """Return the units that hold training documents which are test documents elsewhere, with their drops written."""
    windows = {unit.name: _window(receipts / f"{unit.name}.window") for unit in units}
    tests = {row["hash"].tobytes() for rows in windows.values() for row in rows[rows["test"] == 1]}
    found = []
    for unit in units:
        rows = windows[unit.name]
        numbers = [int(row["number"]) for row in rows if not row["test"] and row["hash"].tobytes() in tests]
        if numbers:
            drop = np.zeros(max(numbers) + 1, dtype=np.uint8)
            drop[numbers] = TEST_ELSEWHERE
            files.write_atomic(receipts / f"{unit.name}.drop", drop.tobytes())
            found.append(unit)
    return found


def _window(path: Path) -> np.ndarray:
    try:
        return np.fromfile(path, dtype=_WINDOW)
    except FileNotFoundError:
        return np.zeros(0, dtype=_WINDOW)
