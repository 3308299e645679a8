"""Token shards on disk: what `preprocess` writes and everything else reads.

`OUT/dataset.json` describes the whole; `OUT/LANG/train-00000.bin` holds ids (little-endian uint16 where the
vocabulary fits, else uint32), document after document, each with the tokenizer's BOS and EOS where it has them;
`.idx` beside it holds uint64 offsets, one more than documents; `OUT/tokenizer/` is a copy of the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ekiden.checkpoint import files
from ekiden.errors import UserError, nearest
from ekiden.tokenizer.load import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "test")
MAX_MAPS = 128
"""Shards mapped at once: each map holds a file descriptor, of which many systems give a process 1,024."""


@dataclass
class Shard:
    """One pair of files: `name` without suffix, tokens and documents in it, size and xxh3-128 of both files."""

    name: str
    tokens: int
    documents: int
    bytes: int
    bin_xxh3: str
    idx_xxh3: str


@dataclass
class Split:
    """One split of one language: totals and shards; `bytes` are UTF-8 bytes of the text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: list[Shard] = field(default_factory=list)

    def add(self, shard: Shard) -> None:
        """Count one more shard."""
        self.shards.append(shard)
        self.documents += shard.documents
        self.tokens += shard.tokens
        self.bytes += shard.bytes


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type ids are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes one shard: ids and offsets, under temporary names until `finish`, a document's memory at a time.

    The temporary names are this writer's own: a worker that outlived a killed build must not write into the files of
    the next one.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        own = secrets.token_hex(4)
        self._temporary = {suffix: folder / f".{name}-{own}{suffix}.tmp" for suffix in (".bin", ".idx")}
        self._files = {suffix: path.open("wb", buffering=1 << 18) for suffix, path in self._temporary.items()}
        self._files[".idx"].write(bytes(8))
        self.tokens = self.documents = self.bytes = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document: its ids, and the UTF-8 bytes of its text."""
        self._files[".bin"].write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)
        self._files[".idx"].write(self.tokens.to_bytes(8, "little"))
        self.documents += 1
        self.bytes += text_bytes

    def finish(self) -> Shard | None:
        """Make the shard durable under its name; None where it has no document."""
        hashes = []
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            temporary = self._temporary[suffix]
            if not self.documents:
                temporary.unlink()
                continue
            hashes.append(hash_file(temporary))
            temporary.replace(self.folder / (self.name + suffix))
        if not self.documents:
            return None
        files.sync_folder(self.folder)
        return Shard(self.name, self.tokens, self.documents, self.bytes, *hashes)


class TokenStream:
    """One split of one language as a single sequence of tokens, read from memory-mapped shards."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype[Any], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.tokens, self.documents, self.bytes = split.tokens, split.documents, split.bytes
        self._folder, self._dtype = folder, dtype
        self._shards = [shard for shard in split.shards if shard.tokens]
        self._ends = list(accumulate(shard.tokens for shard in self._shards))
        self._maps: dict[int, np.ndarray] = {}

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            if len(self._maps) >= MAX_MAPS:
                self._maps.clear()
            path = self._folder / f"{self._shards[index].name}.bin"
            self._maps[index] = np.memmap(path, dtype=self._dtype, mode="r")
        return self._maps[index]

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from position `start`, int64, across shard borders; the stream is read as a ring.

        Raises:
            UserError: what lies there is no token of the vocabulary.
        """
        assert self.tokens > 0
        parts, position = [], start % self.tokens
        while count > 0:
            index = bisect_right(self._ends, position)
            begin = position - (self._ends[index] - self._shards[index].tokens)
            part = self._map(index)[begin : begin + count]
            if part.max() >= self.vocab_size:
                raise UserError(
                    f"{self._folder / self._shards[index].name}.bin is damaged: token {part.max()} of a vocabulary of "
                    f"{self.vocab_size}; preprocess again, or copy the folder again"
                )
            parts.append(part)
            count -= len(part)
            position = (position + len(part)) % self.tokens
        return np.concatenate(parts).astype(np.int64)

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document, int64, with its BOS and EOS.

        Raises:
            IndexError: there are fewer documents.
        """
        for index, shard in enumerate(self._shards):
            if number < shard.documents:
                offsets = np.fromfile(
                    self._folder / f"{shard.name}.idx", dtype="<u8", count=2, offset=8 * number
                )
                return np.array(self._map(index)[offsets[0] : offsets[1]], dtype=np.int64)
            number -= shard.documents
        raise IndexError(number)


class TokenDataset:
    """A folder of token shards, opened for reading."""

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self.path, self.description = path, description
        self.dtype = np.dtype(description["dtype"])
        self.vocab_size: int = description["vocab_size"]
        self.tokenizer_sha256: str = description["tokenizer_sha256"]
        self.rejected: dict[str, dict[str, int]] = description["rejected"]
        self.splits = {
            language: {
                name: Split(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})
                for name, values in splits.items()
            }
            for language, splits in description["languages"].items()
        }

    @classmethod
    def open(cls, path: str | Path) -> TokenDataset:
        """Open the shards in `path` after checking that every file has its size.

        Raises:
            UserError: missing, unfinished, of another version, or damaged.
        """
        path = Path(path)
        try:
            description = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
            if description["version"] != FORMAT_VERSION:
                raise UserError(
                    f"{path}/dataset.json has version {description['version']}, this program reads {FORMAT_VERSION}; "
                    "preprocess the corpus again"
                )
            dataset = cls(path, description)
        except (FileNotFoundError, NotADirectoryError):
            what = "is not a folder" if not path.is_dir() else "holds no dataset.json (an unfinished build?)"
            raise UserError(
                f"--dataset-path {path} {what}; give the --output-dir of `ekiden preprocess`"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}/dataset.json is damaged ({type(error).__name__}: {error}); preprocess again"
            ) from None
        dataset._check_sizes()
        return dataset

    def _check_sizes(self) -> None:
        for folder, shard in self._all_shards():
            for suffix, size in (
                (".bin", shard.tokens * self.dtype.itemsize),
                (".idx", 8 * (shard.documents + 1)),
            ):
                file = folder / (shard.name + suffix)
                found = file.stat().st_size if file.is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes, expected {size}"
                    raise UserError(f"{file} {state}; preprocess again, or copy the folder again")

    def _all_shards(self) -> list[tuple[Path, Shard]]:
        return [
            (self.path / language, shard)
            for language, splits in self.splits.items()
            for split in splits.values()
            for shard in split.shards
        ]

    def verify(self) -> int:
        """Compare the hash of every file; return how many there are.

        Raises:
            UserError: one differs.
        """
        for folder, shard in self._all_shards():
            for suffix, expected in ((".bin", shard.bin_xxh3), (".idx", shard.idx_xxh3)):
                if hash_file(folder / (shard.name + suffix)) != expected:
                    raise UserError(
                        f"{folder / (shard.name + suffix)} is damaged; preprocess again, or copy the folder again"
                    )
        return 2 * len(self._all_shards())

    @property
    def languages(self) -> list[str]:
        """Names of the languages, sorted."""
        return sorted(self.splits)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the tokens: everything in dataset.json."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the shards, from the copy beside them.

        Raises:
            UserError: the copy is missing, or is another tokenizer.
        """
        tokenizer = load_tokenizer(self.path / "tokenizer")
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise UserError(
                f"{self.path / 'tokenizer'} is not the tokenizer that made these shards ({tokenizer.sha256[:12]}, not "
                f"{self.tokenizer_sha256[:12]}); copy the folder again, or preprocess anew"
            )
        return tokenizer

    def split(self, language: str, split: str) -> TokenStream:
        """Return one split of one language; it may be empty.

        Raises:
            UserError: there is no such language.
        """
        if language not in self.splits:
            raise UserError(f"{self.path} holds no language {language!r}{nearest(language, self.splits)}")
        return TokenStream(
            self.path / language, self.splits[language].get(split, Split()), self.dtype, self.vocab_size
        )

    def describe(self) -> str:
        """Return a table: a row a language, and what was rejected."""
        rows = [f"{'language':<14}{'split':<7}{'documents':>11}{'tokens':>15}{'bytes/token':>13}"]
        for language in self.languages:
            for name, split in self.splits[language].items():
                ratio = f"{split.bytes / split.tokens:.2f}" if split.tokens else "-"
                rows.append(f"{language:<14}{name:<7}{split.documents:>11,}{split.tokens:>15,}{ratio:>13}")
            for reason, count in self.rejected.get(language, {}).items():
                rows.append(f"{language:<14}rejected: {count:,} ({reason})")
        return "\n".join(rows)


def dump_description(
    languages: dict[str, dict[str, Split]],
    rejected: dict[str, dict[str, int]],
    tokenizer: Tokenizer,
    **facts: Any,
) -> bytes:
    """Return the bytes of `dataset.json`."""
    value = {
        "version": FORMAT_VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        **facts,
        "languages": {
            language: {name: asdict(split) for name, split in splits.items()}
            for language, splits in languages.items()
        },
        "rejected": rejected,
    }
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file, in hex."""
    hashes = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hashes.update(chunk)
    return hashes.hexdigest()
