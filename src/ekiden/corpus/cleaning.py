"""Cleaning that is asked for by name: duplicates, short documents, Unicode normalisation.

`Cleaning.clean` is what one document can be judged by. Duplicates need the whole corpus: a worker writes a sketch of
every document (`sketch`: a 128-bit hash; for near duplicates a MinHash signature of 128 bytes), `duplicates` decides
over all sketches which documents go, and a second reading leaves those out (`Cleaner`), each counted under its reason.
The first document in the order of the corpus stays, so nothing depends on the number of workers.

Near duplicates: 16-character shingles of the lower-cased text with its white space made single (characters, because
Thai or Chinese have no words between spaces), 128 MinHash values by `rensa` (Broder 1997), of each the low 8 bits
(b-bit MinHash, Li & Koenig 2010), in 16 bands of 8. Documents that share a band are compared by the whole signature
and are near duplicates from an estimated Jaccard similarity of 0.8 on (standard error 0.035); of documents with a
true similarity of 0.8 a band meets in 95 % of the cases, with 0.9 in 99.99 %, with 0.5 in 6 %. rensa is integer arithmetic from
a seed, and its `ALGORITHM_VERSION`, which says when its values change, is part of a build's identity. It was
preferred to datasketch for its speed (whole signatures at 170 MB/s of text a core, shingles made) and because
datasketch draws its permutations from numpy's legacy generator. A document that only contains another is not found.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ekiden.corpus.documents import Rejected
from ekiden.corpus.script import ScriptTally
from ekiden.errors import UsageError
from ekiden.optional import require

SHINGLE, PERMUTATIONS, BANDS, THRESHOLD = 16, 128, 16, 0.8
_SEED = 20
_CHUNK = 1 << 15
"""Characters shingled at a time: the intermediate arrays stay in the processor's cache."""

MAX_PIVOTS = 64
"""Rounds of comparing within one band's bucket; what is left is compared with its neighbour only."""

_PAIRS_AT_ONCE = 1 << 16

KEPT, EXACT, NEAR, NEAR_TEST, TEST_ELSEWHERE = range(5)
REASONS = {
    EXACT: "exact duplicate",
    NEAR: "near duplicate",
    NEAR_TEST: "near duplicate of a test document",
    TEST_ELSEWHERE: "test document of another language",
}
"""Why a document was left out, as the ledger says it; the codes stand in the files of a build."""


@dataclass(frozen=True)
class Cleaning:
    """What was asked for.

    Attributes:
        dedupe: None, 'exact' (the same text) or 'near' (the same text, or nearly).
        min_length: characters a document must have.
        nfc: texts are brought to Unicode's composed form first.
        minhash: version of the library's values where near duplicates are asked for; a build is one version's.
    """

    dedupe: str | None = None
    min_length: int = 0
    nfc: bool = False
    minhash: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.dedupe not in (None, "exact", "near"):
            raise UsageError(f"--dedupe must be exact or near, not {self.dedupe!r}")
        if self.min_length < 0:
            raise UsageError(f"--min-length must be a number of characters from 0 on, not {self.min_length}")
        if self.dedupe == "near":
            object.__setattr__(self, "minhash", _rensa().RMinHash.ALGORITHM_VERSION)

    def clean(self, text: str) -> str:
        """Return the text as it is kept.

        Raises:
            Rejected: it is too short.
        """
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        if len(text) < self.min_length:
            raise Rejected(f"shorter than {self.min_length} characters")
        return text


class Cleaner:
    """Judges the documents of one unit in their order; given to the reader of documents, which knows their places.

    Args:
        drop: uint8, one of the codes of REASONS or KEPT for each document that `Cleaning.clean` lets pass; documents
            beyond it are kept; None: all are.
        scripts: counts the scripts of what is kept.
    """

    def __init__(
        self, cleaning: Cleaning, drop: np.ndarray | None = None, scripts: ScriptTally | None = None
    ) -> None:
        self.cleaning, self.drop, self.scripts = cleaning, drop, scripts
        self.passed = 0

    def __call__(self, text: str, file: str, place: int) -> str:
        """Return the text as it is kept.

        Raises:
            Rejected: it is not kept.
        """
        text = self.cleaning.clean(text)
        number = self.passed
        self.passed += 1
        if self.drop is not None and number < len(self.drop) and self.drop[number] != KEPT:
            raise Rejected(REASONS[int(self.drop[number])])
        if self.scripts is not None:
            self.scripts.count(text, file, place)
        return text


def _rensa() -> Any:
    return require("rensa", "--dedupe near", extra="dedupe")


def sketch_type(near: bool) -> np.dtype[Any]:
    """Return the type of one document's sketch: 21 bytes, with `near` 149."""
    fields: list[Any] = [("hash", "<u8", (2,)), ("bytes", "<u4"), ("test", "u1")]
    return np.dtype([*fields, ("bands", "<u8", (BANDS,))] if near else fields)


def sketch(texts: list[str], are_test: list[bool], near: bool) -> np.ndarray:
    """Return the sketches of some documents, of `sketch_type`, [len(texts)]."""
    sketches = np.zeros(len(texts), dtype=sketch_type(near))
    encoded = [text.encode() for text in texts]
    digests = b"".join(xxhash.xxh3_128_digest(data) for data in encoded)
    sketches["hash"] = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    sketches["bytes"] = [len(data) for data in encoded]
    sketches["test"] = are_test
    if near and texts:
        sketches["bands"] = signatures(texts)
    return sketches


def signatures(texts: list[str]) -> np.ndarray:
    """Return the MinHash signatures of texts: uint64 [texts, BANDS], 8 values of 8 bits in each."""
    parts = [shingle_hashes(text) for text in texts]
    offsets = np.zeros(len(parts) + 1, dtype=np.uint64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    rows = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(parts), offsets, PERMUTATIONS, _SEED
    )
    return np.array(rows.to_rows(), dtype=np.uint32).astype(np.uint8).view("<u8")


def shingle_hashes(text: str) -> np.ndarray:
    """Return a hash of every run of SHINGLE characters: uint64 [max(1, characters - SHINGLE + 1)].

    By doubling: the hash of 2w characters is made of those of its two halves, so that 16 need four steps.
    """
    folded = " ".join(text.lower().split())
    codes = np.frombuffer(folded.encode("utf-32-le"), dtype="<u4")
    count = max(1, len(codes) - SHINGLE + 1)
    result = np.zeros(count, dtype=np.uint64)
    factor, shift = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)
    for start in range(0, count, _CHUNK):
        hashes = codes[start : min(start + _CHUNK, count) + SHINGLE - 1].astype(np.uint64) * factor
        width = 1
        while width < SHINGLE and len(hashes) > width:
            joined = hashes[:-width] * factor
            joined += hashes[width:]
            joined ^= joined >> shift
            hashes, width = joined, 2 * width
        result[start : start + _CHUNK] = hashes[: min(_CHUNK, count - start)]
    return result


class Sketches:
    """The sketches of a corpus in order, one file a unit.

    Only one column is in memory at a time: for 20 million documents 320 MB of hashes and 160 MB of their order, or
    160 MB of one band and 160 MB of its order. Files are mapped while they are read and no longer: there may be more
    of them than a process may hold open.
    """

    def __init__(self, paths: list[Path], dtype: np.dtype[Any]) -> None:
        self.paths, self.dtype = paths, dtype
        self.starts = np.cumsum([0, *(path.stat().st_size // dtype.itemsize for path in paths)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _unit(self, number: int) -> np.ndarray:
        if self.starts[number] == self.starts[number + 1]:
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.paths[number], dtype=self.dtype, mode="r")

    def column(self, name: str, band: int | None = None) -> np.ndarray:
        """Return one field of all documents."""
        shape, kind = (() if band is not None else self.dtype[name].shape), self.dtype[name].base
        result = np.empty((len(self), *shape), dtype=kind)
        for number, (start, end) in enumerate(zip(self.starts, self.starts[1:])):
            values = self._unit(number)[name]
            result[start:end] = values if band is None else values[:, band]
        return result

    def signatures(self, numbers: np.ndarray) -> np.ndarray:
        """Return the signatures of some documents, uint8 [n, PERMUTATIONS]."""
        result = np.empty((len(numbers), PERMUTATIONS), dtype=np.uint8)
        units = np.searchsorted(self.starts, numbers, side="right") - 1
        for unit in np.unique(units):
            where = units == unit
            rows = self._unit(unit)["bands"][numbers[where] - self.starts[unit]]
            result[where] = np.ascontiguousarray(rows).view(np.uint8)
        return result

    def cut(self, values: np.ndarray) -> Iterator[np.ndarray]:
        """Yield one array a unit of values that stand for all documents."""
        for start, end in zip(self.starts, self.starts[1:]):
            yield values[start:end]


def duplicates(sketches: Sketches, near: bool) -> np.ndarray:
    """Return for every document why it goes: uint8 [documents], KEPT or a code of REASONS."""
    verdict = np.zeros(len(sketches), dtype=np.uint8)
    if not len(sketches):
        return verdict
    verdict[repeated(sketches.column("hash"))] = EXACT
    if near:
        alive = np.flatnonzero(verdict == KEPT)
        first = nearly_repeated(alive, lambda b: sketches.column("bands", b)[alive], sketches.signatures)
        test = sketches.column("test").astype(bool)
        gone = alive[first != alive]
        kept = first[first != alive]
        verdict[gone] = np.where(test[kept] & ~test[gone], NEAR_TEST, NEAR)
    return verdict


def repeated(hashes: np.ndarray) -> np.ndarray:
    """Return the numbers of the rows of `hashes` (uint64 [n, 2]) that stood before."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in the order of the corpus
    same = np.ones(max(0, len(order) - 1), dtype=bool)
    for half in range(2):
        ordered = hashes[order, half]
        same &= ordered[1:] == ordered[:-1]
    return order[1:][same]


def nearly_repeated(
    numbers: np.ndarray,
    band: Callable[[int], np.ndarray],
    signatures_of: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return for each document the first one that it repeats, itself where there is none.

    Nearness is taken further along chains (A like B, B like C: all go but A), so that no two documents stay that are
    near one another.

    Args:
        numbers: of the documents, int64 [n], rising.
        band: gives the keys of one band, uint64 [n].
        signatures_of: gives signatures by number, uint8 [m, PERMUTATIONS].

    Returns:
        int64 [n].
    """
    parent = np.arange(len(numbers))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for number in range(BANDS):
        for left, right in _candidates(band(number)):
            near = np.empty(len(left), dtype=bool)
            for start in range(0, len(left), _PAIRS_AT_ONCE):
                some = slice(start, start + _PAIRS_AT_ONCE)
                near[some] = _alike(signatures_of(numbers[left[some]]), signatures_of(numbers[right[some]]))
            for a, b in zip(left[near].tolist(), right[near].tolist()):
                a, b = root(a), root(b)
                parent[max(a, b)] = min(a, b)
            right[near] = -1  # told to the generator: found, not to be compared any more
    return numbers[np.array([root(i) for i in range(len(numbers))], dtype=np.int64)]


def _alike(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return which rows are of documents with an estimated Jaccard similarity of THRESHOLD at least.

    Two different values have the same low 8 bits once in 256 (Li & Koenig 2010, eq. 5 for large sets).
    """
    equal = np.count_nonzero(left == right, axis=1) / PERMUTATIONS
    return (equal - 1 / 256) / (1 - 1 / 256) >= THRESHOLD


def _candidates(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of positions with the same key: a bucket's first with all others, then the rest in the same way.

    The receiver sets the right positions of pairs that need not be looked at again to -1.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.zeros(len(order) + 1, dtype=bool)
    same[1:-1] = ordered[1:] == ordered[:-1]
    members = np.flatnonzero(same[:-1] | same[1:])  # of buckets of two and more
    bucket = np.cumsum(~same[:-1][members])
    members = order[members]
    for _ in range(MAX_PIVOTS):
        is_pivot = np.ones(len(members), dtype=bool)
        is_pivot[1:] = bucket[1:] != bucket[:-1]
        others = np.flatnonzero(~is_pivot)
        if not len(others):
            return
        pivots = members[np.flatnonzero(is_pivot)[np.cumsum(is_pivot) - 1]]
        right = members[others].copy()
        yield pivots[others], right
        left_over = others[right >= 0]
        members, bucket = members[left_over], bucket[left_over]
    pairs = np.flatnonzero(bucket[1:] == bucket[:-1])
    if len(pairs):
        yield members[pairs], members[pairs + 1].copy()
