"""`preprocess`: from a corpus to token shards, in parallel, the same bytes whatever the number of workers.

`units` cuts the corpus; here a worker turns one unit into one pair of shards per split and leaves a receipt, and a
build that was killed keeps the units that have one. Any `concurrent.futures` executor whose workers see the output
folder and the corpus under the same paths can run the units. `dataset.json` is written last, so a folder without it
is an unfinished build and is never taken for data.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import xxhash

from ekiden.checkpoint import files
from ekiden.corpus.cleaning import Cleaner, Cleaning
from ekiden.corpus.documents import divide, read_documents
from ekiden.corpus.ledger import Ledger
from ekiden.corpus.script import ScriptTally
from ekiden.corpus.sources import discover
from ekiden.errors import UsageError, UserError
from ekiden.progress import Progress, human_count, say
from ekiden.tokenizer.load import Tokenizer, load_tokenizer
from ekiden.tokens.cluster import dask_executor
from ekiden.tokens.dedupe import Window, dropped, leaks, remove_duplicates
from ekiden.tokens.format import (
    SPLITS,
    Shard,
    ShardWriter,
    Split,
    TokenDataset,
    dump_description,
    token_dtype,
)
from ekiden.tokens.units import (
    Settings,
    Unit,
    difference,
    identity_of,
    keep_fraction,
    plan_units,
    split_of,
    test_splits,
)

BATCH_BYTES = 1 << 20
"""Text encoded in one call: enough to keep the call's cost small, little enough to bound a worker's memory."""

POLL_SECONDS = 0.5
RECEIPTS, TOKENIZER, MARKER, LOCK = ".receipts", "tokenizer", ".build", ".lock"


def preprocess(
    corpus: list[str],
    tokenizer: str | Tokenizer,
    output_dir: str,
    dataset_size: str | int | None = None,
    test_split: float = 0.002,
    num_proc: int | None = None,
    language: str | None = None,
    txt_documents: str = "blank-line",
    dedupe: str | None = None,
    min_length: int = 0,
    nfc: bool = False,
    scheduler: str | None = None,
    executor: Executor | None = None,
) -> TokenDataset:
    """Write the token shards of `corpus` to `output_dir` and return them.

    Args:
        corpus: folders with a sub-folder a language; with `language`, files and folders of that one;
            [LANGUAGE=]hf://datasets/OWNER/NAME[@config][:split].
        dataset_size: tokens to keep ('10k', '1M', '1B', or a number), as an unbiased sample of the documents of every
            language; None: all.
        test_split: share of documents kept for evaluation, chosen by their hash; more of a language under 50 MB, so
            that about 100 KB of it can be measured, but at most 5 %. 0: none.
        num_proc: worker processes; None: one a core.
        txt_documents: 'blank-line' or 'file', see `corpus.documents`.
        dedupe, min_length, nfc: see `corpus.cleaning.Cleaning`.
        scheduler: address of a Dask scheduler whose workers do the work.
        executor: runs the units instead of worker processes of its own.

    Raises:
        UserError: corpus or tokenizer are missing, the folder holds another build, the disk is full, a worker died.
    """
    if not 0 <= test_split < 1:
        raise UsageError(f"--test-split must be a share of the documents from 0 to below 1, not {test_split}")
    if num_proc is not None and num_proc < 1:
        raise UsageError(f"--num-proc must be at least 1 worker process, not {num_proc}")
    cleaning = Cleaning(dedupe, min_length, nfc)
    folder = Path(output_dir)
    if scheduler is not None:  # whose workers are in other folders
        folder = folder.absolute()
        corpus = [path if "hf://" in path else str(Path(path).absolute()) for path in corpus]
    sources = discover(corpus, language, pinned_commits(folder))
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    units = plan_units(sources)
    paths = {file.path for found in sources.values() for file in found}
    try:
        keep = keep_fraction(dataset_size, units, loaded, txt_documents)
        settings = Settings(test_splits(sources, test_split), keep, txt_documents, cleaning)
        identity = identity_of(sources, loaded, settings)
        if (folder / "dataset.json").exists():
            return finished_build(folder, identity)
        with locked(folder):
            if (folder / "dataset.json").exists():
                return finished_build(folder, identity)
            prepare_folder(folder, identity, units, loaded)
            with worker_pool(len(units), num_proc, scheduler, executor, folder, sorted(paths)[:1]) as pool:
                settings = build_all(units, loaded.sha256, settings, folder, pool)
            return finish(units, loaded, settings, folder)
    except OSError as error:
        if error.filename and str(error.filename) in paths:
            raise UserError(
                f"corpus file {error.filename} could not be read ({error.strerror}); mend it and run the same command again"
            ) from None
        raise UserError(
            f"--output-dir {folder} could not be written ({error.strerror or error}); free some space and run the same "
            "command again, finished shards are kept"
        ) from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which a killed process loses.

    Raises:
        UserError: another build holds it; or the folder holds something that is no build.
    """
    if (
        folder.exists()
        and any(path.name != LOCK for path in folder.iterdir())
        and not (folder / MARKER).exists()
    ):
        raise UserError(f"--output-dir {folder} is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"--output-dir {folder} is being written by another `ekiden preprocess`; wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def finished_build(folder: Path, identity: dict[str, Any]) -> TokenDataset:
    """Return the build that is already there.

    Raises:
        UserError: it is of another corpus, tokenizer or setting.
    """
    dataset = TokenDataset.open(folder)
    if other := other_build(folder, identity):
        raise UserError(
            f"--output-dir {folder} holds shards of another corpus, tokenizer or setting ({other}); remove it or give "
            "another folder"
        )
    shutil.rmtree(folder / RECEIPTS, ignore_errors=True)  # a kill just after dataset.json left them
    say(f"{folder} is already complete")
    return dataset


def other_build(folder: Path, identity: dict[str, Any]) -> str:
    """Return in words how the build in `folder` is another one than `identity`; '' where it is the same."""
    try:
        found = json.loads((folder / MARKER).read_bytes())
    except FileNotFoundError:
        return f"it has no {MARKER}"
    except ValueError:
        return "another version of the program made it"
    # Through JSON, as the other one: tuples are lists there.
    return difference(found, json.loads(json.dumps(identity)))


def prepare_folder(folder: Path, identity: dict[str, Any], units: list[Unit], tokenizer: Tokenizer) -> None:
    """Make the folder ready for a new build, or for going on with this very one.

    Raises:
        UserError: it holds another build.
    """
    if (folder / MARKER).exists():
        if other := other_build(folder, identity):
            raise UserError(
                f"--output-dir {folder} holds an unfinished build of another corpus, tokenizer or setting ({other}); repeat "
                "that command, remove the folder or give another"
            )
    else:
        files.write_atomic(folder / MARKER, json.dumps(identity, ensure_ascii=False).encode())
    for name in {unit.language for unit in units} | {RECEIPTS, TOKENIZER}:
        files.make_folders(folder / name)
        for left in (folder / name).glob(".*.tmp"):
            files.remove_file(left)
    for name, data in tokenizer.files.items():
        files.write_atomic(folder / TOKENIZER / name, data)


def pinned_commits(folder: Path) -> dict[str, str]:
    """Return the commits of the hub's datasets that an unfinished build in `folder` reads, by OWNER/NAME."""
    try:
        names = json.loads((folder / MARKER).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found = (re.fullmatch(r".+?: ([^/]+/[^/@]+)@([0-9a-f]{40})/.+", name) for name in names)
    return {match[1]: match[2] for match in found if match}


@contextlib.contextmanager
def worker_pool(
    most: int,
    num_proc: int | None,
    scheduler: str | None,
    executor: Executor | None,
    folder: Path,
    corpus: list[str],
) -> Iterator[Executor]:
    """Yield what runs the units: `executor`, a Dask cluster, or at most `most` worker processes.

    Raises:
        UserError: a worker process died.
    """
    if executor is not None:
        yield executor
        return
    if scheduler is not None:
        with dask_executor(scheduler, folder, corpus) as executor:
            yield executor
        return
    workers = max(1, min(num_proc or len(os.sched_getaffinity(0)), most))
    # spawn: a forked worker would inherit locks of threads that it does not have.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
    )
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended before its work was done (killed for memory?); run the same command again with a lower "
            '--num-proc, finished shards are kept (a script of your own needs `if __name__ == "__main__":` around it)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def build_all(
    units: list[Unit], tokenizer_sha256: str, settings: Settings, folder: Path, pool: Executor
) -> Settings:
    """Build every unit, after duplicates were found where that was asked, and return the settings they were built with.

    What is kept for a sample is the wanted share of what cleaning leaves.
    """
    receipts = folder / RECEIPTS
    if settings.cleaning.dedupe:
        left = remove_duplicates(units, settings, receipts, pool)
        settings = replace(settings, keep_fraction=min(1.0, settings.keep_fraction / left))
    build_units(units, tokenizer_sha256, settings, folder, pool)
    if leaking := leaks(units, receipts):
        for unit in leaking:
            for left_over in (folder / unit.language).glob(f"unit-{unit.number:05d}-*"):
                files.remove_file(left_over)
            files.remove_file(receipts / unit.name)
        build_units(units, tokenizer_sha256, settings, folder, pool)
    return settings


def build_units(
    units: list[Unit], tokenizer_sha256: str, settings: Settings, folder: Path, pool: Executor
) -> None:
    """Build every unit that has no receipt."""
    todo = [unit for unit in units if not (folder / RECEIPTS / unit.name).exists()]
    if len(todo) < len(units):
        say(f"going on: {len(units) - len(todo)} of {len(units)} units are done")
    # The longest first: a compressed file is one unit, and must not be the last to begin.
    todo.sort(key=lambda unit: -unit.bytes)
    follow(
        {pool.submit(build_unit, unit, tokenizer_sha256, settings, folder): unit for unit in todo},
        sum(unit.bytes for unit in units),
        folder,
    )


def follow(futures: dict[Future[dict[str, int]], Unit], total: int, folder: Path) -> None:
    """Wait for the units and show how far they are, the unfinished ones by the notes that their workers leave."""
    waiting = set(futures)
    figures = {"documents": 0, "tokens": 0}
    finished = total - sum(unit.bytes for unit in futures.values())
    started = time.monotonic()
    with Progress(total, "B", "preprocess", initial=finished) as progress:
        while waiting:
            done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                finished += futures[future].bytes
                for name in figures:
                    figures[name] += result[name]
            notes = [read_note(folder, futures[future]) for future in waiting if future.running()]
            reached = finished + sum(note["bytes"] for note in notes)
            shown = {name: number + sum(note[name] for note in notes) for name, number in figures.items()}
            rate = shown["tokens"] / max(1e-3, time.monotonic() - started)
            progress.update(
                max(0, reached - progress.done),
                documents=human_count(shown["documents"]),
                tokens=human_count(shown["tokens"]),
                **{"tokens/s": human_count(rate)},
            )


def read_note(folder: Path, unit: Unit) -> dict[str, int]:
    """Return how far the worker of a unit is: input bytes, documents, tokens."""
    try:
        numbers = [int(word) for word in (folder / RECEIPTS / f".{unit.name}.note.tmp").read_text().split()]
    except (OSError, ValueError):
        numbers = []
    return dict(zip(("bytes", "documents", "tokens"), numbers if len(numbers) == 3 else (0, 0, 0)))


def start_worker() -> None:
    """Prepare a worker process: one thread for each, and it ends when the build is killed.

    The pool's workers would otherwise wait for ever, and write beside those of the next build.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=1)
def worker_tokenizer(folder: Path, sha256: str) -> Tokenizer:
    """Return the tokenizer that lies in `folder`, opened once in a worker."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer.sha256 == sha256
    return tokenizer


def build_unit(unit: Unit, tokenizer_sha256: str, settings: Settings, folder: Path) -> dict[str, int]:
    """Turn one unit into its shards, leave a receipt, and return its documents and tokens. Runs in a worker."""
    tokenizer = worker_tokenizer(folder / TOKENIZER, tokenizer_sha256)
    scripts, window = ScriptTally(), Window(settings)
    cleaner = Cleaner(settings.cleaning, dropped(unit, folder / RECEIPTS), scripts)
    ledger = Ledger(accept=cleaner)
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {
        split: ShardWriter(folder / unit.language, f"unit-{unit.number:05d}-{split}", dtype)
        for split in SPLITS
    }
    before = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=dtype)
    after = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=dtype)
    note, noted = folder / RECEIPTS / f".{unit.name}.note.tmp", time.monotonic()
    done = {"documents": 0, "tokens": 0}
    for texts, position in batches_of(unit, ledger, settings, cleaner, window):
        for (text, split), ids in zip(texts, tokenizer.encode_batch([text for text, _split in texts])):
            writers[split].add(np.concatenate([before, ids.astype(dtype), after]), len(text.encode()))
        done = {name: sum(getattr(writer, name) for writer in writers.values()) for name in done}
        if time.monotonic() - noted > POLL_SECONDS:
            noted = time.monotonic()
            note.write_text(f"{position} {done['documents']} {done['tokens']}")
    shards = {split: writer.finish() for split, writer in writers.items()}
    receipt: dict[str, Any] = {split: asdict(shard) if shard else None for split, shard in shards.items()}
    receipt |= {"ledger": ledger.as_dict(), "scripts": scripts.as_dict()}
    window.save(unit, folder / RECEIPTS)
    files.write_atomic(folder / RECEIPTS / unit.name, json.dumps(receipt).encode())
    note.unlink(missing_ok=True)
    return done


def documents_of(unit: Unit, ledger: Ledger, settings: Settings) -> Iterator[tuple[str, int]]:
    """Yield (text, input bytes of the unit read so far) of every document of a unit."""
    read = 0
    for part in unit.parts:
        for text in read_documents(part.file, ledger, part.start, part.end, settings.txt_documents):
            yield text, read + ledger.position
        read += part.bytes


def batches_of(
    unit: Unit, ledger: Ledger, settings: Settings, cleaner: Cleaner, window: Window
) -> Iterator[tuple[list[tuple[str, str]], int]]:
    """Yield (list of (text, split) of about BATCH_BYTES, input bytes read), without what the sample leaves out.

    Split and sample go by two independent hashes of the text, so they depend on nothing but the document; the
    documents that a long text is divided into stay together.
    """
    share = settings.test_split[unit.language]
    keep_below = int(settings.keep_fraction * 2**64)
    batch: list[tuple[str, str]] = []
    size = position = 0
    for text, position in documents_of(unit, ledger, settings):
        data = text.encode()
        if settings.keep_fraction < 1 and xxhash.xxh3_64_intdigest(data, seed=1) >= keep_below:
            continue
        split = split_of(data, share)
        window.note(data, cleaner.passed - 1, split == "test")
        pieces = divide(text)
        ledger.divided += len(pieces) - 1
        del text, data
        for piece in pieces:
            batch.append((piece, split))
            size += len(piece)
            if size >= BATCH_BYTES:
                yield batch, position
                batch, size = [], 0
    if batch:
        yield batch, position


def number_shard(folder: Path, shard: Shard, name: str) -> None:
    """Give a unit's shard its final name, numbered without gaps; one that a killed build had named is left as it is."""
    for suffix in (".bin", ".idx"):
        if (folder / (shard.name + suffix)).exists():
            files.rename(folder / (shard.name + suffix), folder / (name + suffix))
    shard.name = name


def finish(units: list[Unit], tokenizer: Tokenizer, settings: Settings, folder: Path) -> TokenDataset:
    """Write `dataset.json` from the receipts, say what was rejected, and return the opened shards.

    Raises:
        UserError: not a single document was kept.
    """
    languages: dict[str, dict[str, Split]] = {}
    ledgers: dict[str, Ledger] = {}
    scripts: dict[str, ScriptTally] = {}
    for unit in units:
        receipt = json.loads((folder / RECEIPTS / unit.name).read_text())
        splits = languages.setdefault(unit.language, {split: Split() for split in SPLITS})
        for split in SPLITS:
            if receipt[split]:
                shard = Shard(**receipt[split])
                number_shard(folder / unit.language, shard, f"{split}-{len(splits[split].shards):05d}")
                splits[split].add(shard)
        ledgers.setdefault(unit.language, Ledger()).add(Ledger.from_dict(receipt["ledger"]))
        scripts.setdefault(unit.language, ScriptTally()).add(ScriptTally.from_dict(receipt["scripts"]))
    if not any(split.documents for splits in languages.values() for split in splits.values()):
        reasons = [line for ledger in ledgers.values() for line in ledger.describe()]
        raise UserError(
            f"the corpus holds no document ({'; '.join(reasons) or 'empty files'}); look at the first examples"
        )
    for language in languages:
        for left in (folder / language).glob(".*.tmp"):  # of a worker that died while others went on
            files.remove_file(left)
        files.sync_folder(folder / language)
    for language, ledger in ledgers.items():
        for line in ledger.describe():
            say(f"{language}: {line}")
        for line in scripts[language].warnings(language):
            say(line)
    rejected = {language: dict(sorted(ledger.rejected.items())) for language, ledger in ledgers.items()}
    facts = asdict(settings) | {
        "records_read": {language: ledger.read for language, ledger in ledgers.items()},
        "scripts": {language: dict(sorted(tally.documents.items())) for language, tally in scripts.items()},
    }
    files.write_atomic(folder / "dataset.json", dump_description(languages, rejected, tokenizer, **facts))
    shutil.rmtree(folder / RECEIPTS, ignore_errors=True)
    return TokenDataset.open(folder)
