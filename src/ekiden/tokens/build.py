"""`preprocess`: from a corpus to token shards, in parallel, the same bytes whatever the number of workers.

The input is cut into units by arithmetic on file sizes alone: about 32 MB of one language each. A worker turns one
unit into one pair of shards per split and leaves a receipt; a build that was killed keeps the units that have one.
`dataset.json` is written last, so a folder without it is an unfinished build and is never taken for data.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ekiden.checkpoint import files
from ekiden.corpus.documents import read_documents, row_groups
from ekiden.corpus.ledger import Ledger
from ekiden.corpus.sources import SourceFile, discover, is_compressed
from ekiden.errors import UsageError, UserError
from ekiden.progress import Progress, human_count, say
from ekiden.tokenizer.load import Tokenizer, load_tokenizer
from ekiden.tokens.format import (
    SPLITS,
    Shard,
    ShardWriter,
    Split,
    TokenDataset,
    dump_description,
    token_dtype,
)

UNIT_BYTES = 32 << 20
BATCH_BYTES = 1 << 20
"""Text encoded in one call: enough to keep the call's cost small, little enough to bound a worker's memory."""

TEST_BYTES, MAX_TEST_SPLIT = 100_000, 0.05
"""A small language keeps about this much text for evaluation (else it could not be measured), at most this share."""

RECEIPTS = ".receipts"


@dataclass(frozen=True)
class Part:
    """Records that begin in [start, end) of a file (bytes; row groups of a parquet file)."""

    file: SourceFile
    start: int
    end: int | None


@dataclass(frozen=True)
class Unit:
    """The input of one pair of shards: parts of one language, in order."""

    language: str
    number: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """Name of its receipt."""
        return f"{self.language}-{self.number:05d}"

    @property
    def bytes(self) -> int:
        """Input bytes, about."""
        return sum(
            p.file.size if is_compressed(p.file.path) else (p.end or p.file.size) - p.start
            for p in self.parts
        )


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards, apart from the corpus and the tokenizer."""

    test_split: dict[str, float]
    keep_fraction: float
    txt_documents: str


def preprocess(
    corpus: list[str],
    tokenizer: str | Tokenizer,
    output_dir: str,
    dataset_size: str | int | None = None,
    test_split: float = 0.002,
    num_proc: int | None = None,
    language: str | None = None,
    txt_documents: str = "blank-line",
    executor: Executor | None = None,
) -> TokenDataset:
    """Write the token shards of `corpus` to `output_dir` and return them.

    Args:
        corpus: folders with a sub-folder a language; with `language`, files and folders of that one.
        dataset_size: tokens to keep ('10k', '1M', '1B', or a number), as an unbiased sample of the documents of every
            language; None: all.
        test_split: share of documents kept for evaluation, chosen by their hash; more of a language under 50 MB, so
            that about 100 KB of it can be measured, but at most 5 %. 0: none.
        num_proc: worker processes; None: one a core.
        txt_documents: 'blank-line' or 'file', see `corpus.documents`.
        executor: runs the units instead of worker processes of its own.

    Raises:
        UserError: corpus or tokenizer are missing, the folder holds another build, the disk is full, a worker died.
    """
    if not 0 <= test_split < 1:
        raise UsageError(f"--test-split must be a share of the documents from 0 to below 1, not {test_split}")
    sources = discover(corpus, language)
    if num_proc is not None and num_proc < 1:
        raise UsageError(f"--num-proc must be at least 1 worker process, not {num_proc}")
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    units = plan_units(sources)
    folder = Path(output_dir)
    splits = test_splits(sources, test_split)
    settings = Settings(splits, keep_fraction(dataset_size, units, loaded, txt_documents), txt_documents)
    fingerprint = fingerprint_of(sources, loaded, settings)
    if (folder / "dataset.json").exists():
        return finished_build(folder, fingerprint)
    try:
        prepare_folder(folder, fingerprint, units)
        build_units(units, loaded, settings, folder, num_proc, executor)
        return finish(units, loaded, settings, folder, fingerprint)
    except OSError as error:
        if error.filename and any(
            error.filename == file.path for found in sources.values() for file in found
        ):
            raise UserError(
                f"corpus file {error.filename} could not be read ({error.strerror}); mend it and run the same command again"
            ) from None
        raise UserError(
            f"--output-dir {folder} could not be written ({error.strerror or error}); free some space and run the same "
            "command again, finished shards are kept"
        ) from None


def plan_units(sources: dict[str, list[SourceFile]]) -> list[Unit]:
    """Cut the corpus into units of about UNIT_BYTES; plain files in byte ranges, small files together."""
    units = []
    for language, source_files in sources.items():
        parts: list[Part] = []
        size = number = 0
        for part in (part for file in source_files for part in cut(file)):
            parts.append(part)
            size += part.file.size if part.end is None else (part.end - part.start)
            if size >= UNIT_BYTES or part.file.format == ".parquet":
                units.append(Unit(language, number, tuple(parts)))
                parts, size, number = [], 0, number + 1
        if parts:
            units.append(Unit(language, number, tuple(parts)))
    return units


def cut(file: SourceFile) -> Iterator[Part]:
    """Yield the parts of one file, none much larger than UNIT_BYTES where the format allows it."""
    if file.format == ".parquet":
        count = row_groups(file)
        step = max(1, count * UNIT_BYTES // max(1, file.size))
        for first in range(0, count, step):
            yield Part(file, first, min(first + step, count))
    elif is_compressed(file.path):
        yield Part(file, 0, None)
    else:
        for start in range(0, max(1, file.size), UNIT_BYTES):
            yield Part(file, start, min(start + UNIT_BYTES, file.size))


def keep_fraction(
    size: str | int | None, units: list[Unit], tokenizer: Tokenizer, txt_documents: str
) -> float:
    """Return the share of documents that gives `size` tokens, from the input's bytes and a sample's tokens a byte."""
    if size is None:
        return 1.0
    wanted = _parse_count(size)
    packed = next((p.file.path for u in units for p in u.parts if is_compressed(p.file.path)), None)
    if packed:
        raise UserError(
            f"--dataset-size cannot be estimated from the size of {packed}, which is compressed; unpack it to .jsonl, or "
            "leave the setting out"
        )
    total = sampled_bytes = sampled_tokens = 0
    for unit in units:
        total += unit.bytes
    for unit in units[:: max(1, len(units) // 16)]:
        part, taken = unit.parts[0], 0
        for text in read_documents(part.file, Ledger(), part.start, part.end, txt_documents):
            data = text[:20_000]
            taken += len(data.encode())
            sampled_tokens += len(tokenizer.encode(data)) + 2
            if taken > 200_000:
                break
        sampled_bytes += taken
    if not sampled_bytes:
        return 1.0
    return min(1.0, wanted / (total * sampled_tokens / sampled_bytes))


def test_splits(sources: dict[str, list[SourceFile]], asked: float) -> dict[str, float]:
    """Return the share of each language's documents that is kept for evaluation, from the sizes of its files."""
    sizes = {language: max(1, sum(f.size for f in found)) for language, found in sources.items()}
    return {
        language: max(asked, min(MAX_TEST_SPLIT, TEST_BYTES / size)) if asked else 0.0
        for language, size in sizes.items()
    }


def _parse_count(size: str | int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMB]?)", str(size))
    count = int(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]]) if match else 0
    if count < 1:
        raise UsageError(f"--dataset-size must be tokens such as 10k, 1M or 1B, not {size!r}")
    return count


def fingerprint_of(sources: dict[str, list[SourceFile]], tokenizer: Tokenizer, settings: Settings) -> str:
    """Return what identifies a build: the files by name, size and change time, the tokenizer, the settings."""
    facts = [
        [language, file.path, file.size, Path(file.path).stat().st_mtime_ns]
        for language, source_files in sources.items()
        for file in source_files
    ]
    text = json.dumps([facts, tokenizer.sha256, asdict(settings)])
    return hashlib.sha256(text.encode()).hexdigest()


def finished_build(folder: Path, fingerprint: str) -> TokenDataset:
    """Return the build that is already there.

    Raises:
        UserError: it is of another corpus, tokenizer or setting.
    """
    dataset = TokenDataset.open(folder)
    marker = folder / ".build"
    if not marker.exists() or marker.read_text() != fingerprint:
        raise UserError(
            f"--output-dir {folder} holds shards of another corpus, tokenizer or setting; remove it or give another folder"
        )
    shutil.rmtree(folder / RECEIPTS, ignore_errors=True)  # a kill just after dataset.json left them
    say(f"{folder} is already complete")
    return dataset


def prepare_folder(folder: Path, fingerprint: str, units: list[Unit]) -> None:
    """Make the folder ready for a new build, or for going on with this very one.

    Raises:
        UserError: it holds something else.
    """
    marker = folder / ".build"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise UserError(f"--output-dir {folder} is not empty; give a new folder")
    if marker.exists() and marker.read_text() != fingerprint:
        raise UserError(
            f"--output-dir {folder} holds an unfinished build of another corpus, tokenizer or setting; repeat that command, "
            "remove the folder or give another"
        )
    (folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
    files.write_atomic(marker, fingerprint.encode())
    for language in {unit.language for unit in units}:
        (folder / language).mkdir(exist_ok=True)


def build_units(
    units: list[Unit],
    tokenizer: Tokenizer,
    settings: Settings,
    folder: Path,
    num_proc: int | None,
    executor: Executor | None,
) -> None:
    """Build every unit that has no receipt.

    Raises:
        UserError: a worker process died.
    """
    todo = [unit for unit in units if not (folder / RECEIPTS / unit.name).exists()]
    if len(todo) < len(units):
        say(f"going on: {len(units) - len(todo)} of {len(units)} units are done")
    total = sum(unit.bytes for unit in units)
    progress = Progress(total, "B", "preprocess", initial=total - sum(unit.bytes for unit in todo))
    workers = max(1, min(num_proc or len(os.sched_getaffinity(0)), len(todo)))
    # spawn: a forked worker would inherit locks of threads that it does not have.
    pool = executor or ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
    )
    documents = tokens = 0
    try:
        futures = {pool.submit(build_unit, unit, tokenizer, settings, folder): unit for unit in todo}
        for future in as_completed(futures):
            receipt = future.result()
            for split in SPLITS:
                documents += receipt[split]["documents"] if receipt[split] else 0
                tokens += receipt[split]["tokens"] if receipt[split] else 0
            progress.update(
                futures[future].bytes, documents=human_count(documents), tokens=human_count(tokens)
            )
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended before its work was done (killed for memory?); run the same command again with a lower "
            '--num-proc, finished shards are kept (a script of your own needs `if __name__ == "__main__":` around it)'
        ) from None
    finally:
        progress.close()
        if executor is None:
            pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this worker when the build is killed: the pool's workers would wait for ever, and write beside the next."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def build_unit(unit: Unit, tokenizer: Tokenizer, settings: Settings, folder: Path) -> dict[str, Any]:
    """Turn one unit into its shards and return (and leave) its receipt. Runs in a worker process."""
    ledger = Ledger()
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {
        split: ShardWriter(folder / unit.language, f"unit-{unit.number:05d}-{split}", dtype)
        for split in SPLITS
    }
    before = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=np.int64)
    after = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=np.int64)
    for texts in batches_of(unit, ledger, settings):
        for (text, split), ids in zip(texts, tokenizer.encode_batch([text for text, _split in texts])):
            writers[split].add(np.concatenate([before, ids, after]), len(text.encode()))
    shards = {split: writer.finish() for split, writer in writers.items()}
    receipt: dict[str, Any] = {split: asdict(shard) if shard else None for split, shard in shards.items()}
    receipt["ledger"] = ledger.as_dict()
    files.write_atomic(folder / RECEIPTS / unit.name, json.dumps(receipt).encode())
    return receipt


def batches_of(unit: Unit, ledger: Ledger, settings: Settings) -> Iterator[list[tuple[str, str]]]:
    """Yield lists of (text, split) of about BATCH_BYTES; leave out what the sample leaves out.

    Split and sample go by two independent hashes of the text, so they depend on nothing but the document.
    """
    test_below = int(settings.test_split[unit.language] * 2**64)
    keep_below = int(settings.keep_fraction * 2**64)
    batch: list[tuple[str, str]] = []
    size = 0
    for part in unit.parts:
        for text in read_documents(part.file, ledger, part.start, part.end, settings.txt_documents):
            data = text.encode()
            if settings.keep_fraction < 1 and xxhash.xxh3_64_intdigest(data, seed=1) >= keep_below:
                continue
            batch.append((text, "test" if xxhash.xxh3_64_intdigest(data) < test_below else "train"))
            size += len(data)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def number_shard(folder: Path, shard: Shard, name: str) -> None:
    """Give a unit's shard its final name, numbered without gaps; one that a killed build had named is left as it is."""
    for suffix in (".bin", ".idx"):
        if (folder / (shard.name + suffix)).exists():
            files.rename(folder / (shard.name + suffix), folder / (name + suffix))
    shard.name = name


def finish(
    units: list[Unit], tokenizer: Tokenizer, settings: Settings, folder: Path, fingerprint: str
) -> TokenDataset:
    """Write `dataset.json` from the receipts, say what was rejected, and return the opened shards.

    Raises:
        UserError: not a single document was kept.
    """
    languages: dict[str, dict[str, Split]] = {}
    ledgers: dict[str, Ledger] = {}
    for unit in units:
        receipt = json.loads((folder / RECEIPTS / unit.name).read_text())
        splits = languages.setdefault(unit.language, {split: Split() for split in SPLITS})
        for split in SPLITS:
            if receipt[split]:
                shard = Shard(**receipt[split])
                number_shard(folder / unit.language, shard, f"{split}-{len(splits[split].shards):05d}")
                splits[split].add(shard)
        ledgers.setdefault(unit.language, Ledger()).add(Ledger.from_dict(receipt["ledger"]))
    if not any(split.documents for splits in languages.values() for split in splits.values()):
        reasons = [line for ledger in ledgers.values() for line in ledger.describe()]
        raise UserError(
            f"the corpus holds no document ({'; '.join(reasons) or 'empty files'}); look at the first examples"
        )
    for language in languages:
        files.sync_folder(folder / language)
    for language, ledger in ledgers.items():
        for line in ledger.describe():
            say(f"{language}: {line}")
    tokenizer.save(folder / "tokenizer")
    rejected = {language: dict(sorted(ledger.rejected.items())) for language, ledger in ledgers.items()}
    facts = asdict(settings) | {
        "records_read": {language: ledger.read for language, ledger in ledgers.items()}
    }
    files.write_atomic(folder / "dataset.json", dump_description(languages, rejected, tokenizer, **facts))
    shutil.rmtree(folder / RECEIPTS, ignore_errors=True)
    return TokenDataset.open(folder)
