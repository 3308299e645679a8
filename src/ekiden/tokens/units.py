"""The plan of a build: which records make which shard, which go into the test split, which a sample keeps.

Everything here is arithmetic on the names and sizes of the corpus's files (and, for `--dataset-size`, a look into
them), never on the number of workers: any executor gives the same shards. `build` carries the plan out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ekiden.corpus import hub
from ekiden.corpus.cleaning import Cleaning
from ekiden.corpus.documents import read_documents, row_groups
from ekiden.corpus.formats import SourceFile, is_compressed
from ekiden.corpus.hub import is_remote
from ekiden.corpus.ledger import Ledger
from ekiden.errors import UsageError
from ekiden.tokenizer.load import Tokenizer

UNIT_BYTES = 4 << 20
"""Input of one shard: 28 units of 110 MB keep 4 workers busy to the end; of 8 MB, 14 leave two of them idle in the last
eighth of the time."""

MAX_UNITS = 256
"""Units of a language where its files can be cut: beyond 1 GB they grow, so that 20 GB is not 2,500 pairs of files."""

TEST_BYTES, MAX_TEST_SPLIT = 100_000, 0.05
"""A small language keeps about this much text for evaluation (else it could not be measured), at most this share."""

_SAMPLED_PARTS, _SAMPLED_REMOTE, _SAMPLED_BYTES, _ENCODED_CHARACTERS = 32, 12, 1 << 20, 50_000
_CHECKED_UNITS, _CHECKED_CHARACTERS = 4, 4000
_BLOCK, _BLOCKS = 4096, 64


@dataclass(frozen=True)
class Part:
    """Records that begin in [start, end) of a file (bytes; row groups of a parquet file); `bytes` of it, about."""

    file: SourceFile
    start: int
    end: int | None
    bytes: int


@dataclass(frozen=True)
class Unit:
    """The input of one pair of shards: parts of one language, in order; `bytes` of input, about."""

    language: str
    number: int
    parts: tuple[Part, ...]
    bytes: int

    @property
    def name(self) -> str:
        """Name of its receipt."""
        return f"{self.language}-{self.number:05d}"


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards, apart from the corpus and the tokenizer."""

    test_split: dict[str, float]
    keep_fraction: float
    txt_documents: str
    cleaning: Cleaning = field(default_factory=Cleaning)


def plan_units(sources: dict[str, list[SourceFile]]) -> list[Unit]:
    """Cut the corpus into units of UNIT_BYTES or a little more; plain files in byte ranges, small files together."""
    units = []
    for language, source_files in sources.items():
        wanted = max(UNIT_BYTES, -(-sum(file.size for file in source_files) // MAX_UNITS))
        if any(is_remote(file.path) for file in source_files):
            wanted = max(wanted, hub.BLOCK_BYTES)  # what is fetched at once
        parts: list[Part] = []
        size = number = 0
        for part in (part for file in source_files for part in cut(file, wanted)):
            parts.append(part)
            size += part.bytes
            if size >= wanted:
                units.append(Unit(language, number, tuple(parts), size))
                parts, size, number = [], 0, number + 1
        if parts:
            units.append(Unit(language, number, tuple(parts), size))
    return units


def cut(file: SourceFile, unit_bytes: int) -> Iterator[Part]:
    """Yield the parts of one file, none much larger than `unit_bytes` where the format allows it."""
    if file.format == ".parquet" and not is_remote(file.path):
        count = row_groups(file)
        step = max(1, count * unit_bytes // max(1, file.size))
        for first in range(0, count, step):
            last = min(first + step, count)
            yield Part(file, first, last, file.size * (last - first) // count)
    elif is_compressed(file.path):
        yield Part(file, 0, None, file.size)
    else:
        for start in range(0, max(1, file.size), unit_bytes):
            end = min(start + unit_bytes, file.size)
            yield Part(file, start, end, end - start)


def test_splits(sources: dict[str, list[SourceFile]], asked: float) -> dict[str, float]:
    """Return the share of each language's documents that is kept for evaluation, from the sizes of its files."""
    sizes = {language: max(1, sum(f.size for f in found)) for language, found in sources.items()}
    return {
        language: max(asked, min(MAX_TEST_SPLIT, TEST_BYTES / size)) if asked else 0.0
        for language, size in sizes.items()
    }


def split_of(data: bytes, share: float) -> str:
    """Return the split of a document, by the hash of its UTF-8 bytes: 'test' for `share` of all documents."""
    return "test" if xxhash.xxh3_64_intdigest(data) < int(share * 2**64) else "train"


# -- a sample of so many tokens ------------------------------------------------------------------------------


def keep_fraction(
    size: str | int | None, units: list[Unit], tokenizer: Tokenizer, txt_documents: str
) -> float:
    """Return the share of documents that gives `size` tokens; 1 where all are wanted, or the corpus has no more.

    Raises:
        UsageError: `size` is no number of tokens.
    """
    if size is None:
        return 1.0
    wanted = parse_count(size)
    tokens = estimated_tokens(units, tokenizer, txt_documents)
    return min(1.0, wanted / tokens) if tokens else 1.0


def parse_count(size: str | int, setting: str = "--dataset-size") -> int:
    """Return the number in '10k', '1.5M', '2B', or a number.

    Raises:
        UsageError: it is none, or below 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMB]?)", str(size))
    count = int(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]]) if match else 0
    if count < 1:
        raise UsageError(f"{setting} must be tokens such as 10k, 1M or 1B, not {size!r}")
    return count


def estimated_tokens(units: list[Unit], tokenizer: Tokenizer, txt_documents: str) -> float:
    """Return about how many tokens the corpus has, from a look into parts of every language at equal distances.

    Two ratios a language: bytes of text for each byte of file (markup, other fields, compression), and tokens for
    each byte of text, of which a smaller sample will do. Of a large compressed file only the beginning is seen.
    """
    total = 0.0
    ends = (tokenizer.bos_id is not None) + (tokenizer.eos_id is not None)
    for language in sorted({unit.language for unit in units}):
        mine = [part for unit in units if unit.language == language for part in unit.parts]
        # On the hub every part looked into is a block of 8 MB to fetch.
        most = _SAMPLED_REMOTE if is_remote(mine[0].file.path) else _SAMPLED_PARTS
        step = -(-len(mine) // most)
        read = text_bytes = documents = encoded_bytes = tokens = 0
        for part in mine[step // 2 :: step]:
            looked_at, texts, sizes = _look_into(part, txt_documents)
            read += looked_at
            text_bytes += sum(sizes)
            documents += len(sizes)
            encoded_bytes += sum(len(text.encode()) for text in texts)
            tokens += sum(len(ids) for ids in tokenizer.encode_batch(texts))
        if encoded_bytes and read:
            inside = text_bytes * (tokens / encoded_bytes)
            total += sum(part.bytes for part in mine) / read * (inside + ends * documents)
    return total


def _look_into(part: Part, txt_documents: str) -> tuple[int, list[str], list[int]]:
    """Return (input bytes read, the beginnings of some of their texts, bytes of each of their texts)."""
    ledger, texts, characters, sizes = Ledger(), list[str](), 0, list[int]()
    for text in read_documents(part.file, ledger, part.start, part.end, txt_documents):
        sizes.append(len(text.encode()))
        if characters < _ENCODED_CHARACTERS:
            texts.append(text[:20_000])
            characters += len(texts[-1])
        if ledger.position >= _SAMPLED_BYTES:
            break
    return ledger.position, texts, sizes


def sampled_texts(units: list[Unit], txt_documents: str) -> list[str]:
    """Return the beginnings of a few texts of every language, about 64 KB of each, from units spread over it."""
    texts = []
    for language in {unit.language: None for unit in units}:
        mine = [unit for unit in units if unit.language == language]
        # On the hub every unit looked into is a block of 8 MB to fetch.
        most = 1 if is_remote(mine[0].parts[0].file.path) else _CHECKED_UNITS
        for unit in mine[:: -(-len(mine) // most)]:
            part, size = unit.parts[0], 0
            for text in read_documents(part.file, Ledger(), part.start, part.end, txt_documents):
                texts.append(text[:_CHECKED_CHARACTERS])
                size += len(texts[-1])
                if size >= 4 * _CHECKED_CHARACTERS:
                    break
    return texts


# -- what a build is of --------------------------------------------------------------------------------------


def identity_of(
    sources: dict[str, list[SourceFile]], tokenizer: Tokenizer, settings: Settings
) -> dict[str, Any]:
    """Return what a build is of: its files by name, size and a look at their bytes, the tokenizer, the settings.

    Neither folders nor times count, so that a corpus may be moved or copied between two starts of a build.
    """
    return {
        "files": {
            # A name on the hub holds the commit, and with it every byte.
            f"{language}: {file.name}": [
                file.size,
                "" if is_remote(file.path) else quick_hash(Path(file.path), file.size),
            ]
            for language, source_files in sources.items()
            for file in source_files
        },
        "tokenizer": tokenizer.sha256,
        "unit_bytes": UNIT_BYTES,
        **asdict(settings),
    }


def quick_hash(path: Path, size: int) -> str:
    """Return the xxh3-64 of a file up to 256 KB; of a larger one, of 64 blocks spread evenly from head to tail."""
    hashes = xxhash.xxh3_64()
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            hashes.update(file.read())
        else:
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                hashes.update(file.read(_BLOCK))
    return hashes.hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return in words what the first difference of two identities is; '' where they are the same."""
    before, after = old.get("files", {}), new["files"]
    for name in after:
        if name not in before:
            return f"{name} was not in the corpus then"
        if list(before[name]) != list(after[name]):
            return f"{name} has changed since"
    if missing := next((name for name in before if name not in after), None):
        return f"{missing} was in the corpus then"
    words = {"tokenizer": "the tokenizer was another", "unit_bytes": "another version of the program made it"}
    for name in sorted(new.keys() | old.keys()):
        if old.get(name) != new.get(name):
            return words.get(name, f"{name} was {old.get(name)} then and is {new.get(name)} now")
    return ""
