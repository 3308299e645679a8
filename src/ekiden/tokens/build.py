"""`preprocess`: from a corpus to token shards, in parallel, the same bytes whatever the number of workers.

`units` cuts the corpus, `worker` turns one unit into one pair of shards per split and leaves a receipt, and a build
that was killed keeps the units that have one (`output_folder`). Here they are handed out, followed and put together.
Any `concurrent.futures` executor whose workers see the output folder and the corpus under the same paths can run them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, replace
from pathlib import Path

from ekiden.checkpoint import files
from ekiden.corpus.cleaning import Cleaning
from ekiden.corpus.ledger import Ledger
from ekiden.corpus.script import ScriptTally
from ekiden.corpus.sources import discover
from ekiden.errors import UsageError, UserError
from ekiden.progress import Progress, human_count, say
from ekiden.tokenizer.load import Tokenizer, load_tokenizer
from ekiden.tokens.cluster import dask_executor
from ekiden.tokens.dedupe import leaks, remove_duplicates
from ekiden.tokens.encoders import encoder_class, refusal
from ekiden.tokens.exact import Differs, NotProvable
from ekiden.tokens.format import SPLITS, Shard, Split, TokenDataset, dump_description
from ekiden.tokens.output_folder import (
    RECEIPTS,
    TOKENIZER,
    finished_build,
    locked,
    number_shard,
    pinned_commits,
    prepare_folder,
)
from ekiden.tokens.units import (
    Settings,
    Unit,
    identity_of,
    keep_fraction,
    plan_units,
    sampled_texts,
    test_splits,
)
from ekiden.tokens.worker import build_unit, worker_cache, worker_processes

POLL_SECONDS = 0.5


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
    check_numbers(test_split, num_proc)
    cleaning = Cleaning(dedupe, min_length, nfc)
    folder = Path(output_dir)
    if scheduler is not None:  # whose workers are in other folders
        folder = folder.absolute()
        corpus = [path if "hf://" in path else str(Path(path).absolute()) for path in corpus]
    sources = discover(corpus, language, pinned_commits(folder))
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    units = plan_units(sources)
    paths = {file.path for found in sources.values() for file in found}
    with told_as_user_error(folder, paths):
        keep = keep_fraction(dataset_size, units, loaded, txt_documents)
        settings = Settings(test_splits(sources, test_split), keep, txt_documents, cleaning)
        identity = identity_of(sources, loaded, settings)
        if (folder / "dataset.json").exists():
            return finished_build(folder, identity)
        with locked(folder):
            if (folder / "dataset.json").exists():
                return finished_build(folder, identity)
            prepare_folder(folder, identity, units, loaded)
            first = functools.partial(worker_cache, folder / TOKENIZER, loaded.sha256)
            with worker_pool(len(units), num_proc, scheduler, executor, folder, min(paths), first) as pool:
                settings = build_all(units, loaded, settings, folder, pool)
            return finish(units, loaded, settings, folder)


def check_numbers(test_split: float, num_proc: int | None) -> None:
    """Raise UsageError where a number makes no build."""
    if not 0 <= test_split < 1:
        raise UsageError(f"--test-split must be a share of the documents from 0 to below 1, not {test_split}")
    if num_proc is not None and num_proc < 1:
        raise UsageError(f"--num-proc must be at least 1 worker process, not {num_proc}")


@contextlib.contextmanager
def told_as_user_error(folder: Path, corpus: set[str]) -> Iterator[None]:
    """Turn what reading the corpus or writing the shards raised into a sentence.

    Raises:
        UserError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        if error.filename and str(error.filename) in corpus:
            raise UserError(
                f"corpus file {error.filename} could not be read ({error.strerror}); mend it and run the same command again"
            ) from None
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "free some space" if full else "give a folder on a writable disk"
        raise UserError(
            f"--output-dir {folder} could not be written ({error.strerror or error}); {todo} and run the same "
            "command again, finished shards are kept"
        ) from None


@contextlib.contextmanager
def worker_pool(
    most: int,
    num_proc: int | None,
    scheduler: str | None,
    executor: Executor | None,
    folder: Path,
    file: str,
    first: Callable[[], object],
) -> Iterator[Executor]:
    """Yield what runs the units: `executor`, a Dask cluster that sees the folder and a file of the corpus, or at most
    `most` worker processes, which begin with `first`.

    Raises:
        UserError: a worker process died.
    """
    if executor is not None:
        yield executor
        return
    if scheduler is not None:
        with dask_executor(scheduler, folder, [file]) as executor:
            yield executor
        return
    with worker_processes(most, num_proc, ", finished shards are kept", first) as executor:
        yield executor


def build_all(
    units: list[Unit], tokenizer: Tokenizer, settings: Settings, folder: Path, pool: Executor
) -> Settings:
    """Build every unit, after duplicates were found where that was asked, and return the settings they were built with.

    What is kept for a sample is the wanted share of what cleaning leaves.
    """
    if settings.cleaning.dedupe:
        left = remove_duplicates(units, settings, folder / RECEIPTS, pool)
        settings = replace(settings, keep_fraction=min(1.0, settings.keep_fraction / left))
    cached = takes_cache(units, tokenizer, settings)
    try:
        build_units(units, tokenizer.sha256, settings, folder, pool, cached)
    except NotProvable as reason:  # a worker on another machine
        say(f"a worker has no exact encoder ({reason}); going on without it")
        cached = False
        build_units(units, tokenizer.sha256, settings, folder, pool, cached)
    except Differs as text:
        say(f"the exact encoder gave other ids than SentencePiece for {text}; building again without it")
        cached = False
        forget(units, folder)
        build_units(units, tokenizer.sha256, settings, folder, pool, cached)
    if leaking := leaks(units, folder / RECEIPTS):
        forget(leaking, folder)
        build_units(units, tokenizer.sha256, settings, folder, pool, cached)
    return settings


def takes_cache(units: list[Unit], tokenizer: Tokenizer, settings: Settings) -> bool:
    """Return whether an exact encoder may give the ids: a BPE or unigram model, and all compared texts agree."""
    kind = encoder_class(tokenizer)
    if kind is None:
        return False
    why = refusal(tokenizer, sampled_texts(units, settings.txt_documents))
    if why is not None:
        say(f"this tokenizer is used without the {kind.name}: {why}; the ids are the same, it takes longer")
    return why is None


def forget(units: list[Unit], folder: Path) -> None:
    """Remove what was built of some units."""
    for unit in units:
        for left_over in (folder / unit.language).glob(f"unit-{unit.number:05d}-*"):
            files.remove_file(left_over)
        if (folder / RECEIPTS / unit.name).exists():
            files.remove_file(folder / RECEIPTS / unit.name)


def build_units(
    units: list[Unit], tokenizer_sha256: str, settings: Settings, folder: Path, pool: Executor, cached: bool
) -> None:
    """Build every unit that has no receipt.

    Raises:
        Differs, NotProvable: of a worker's exact encoder; no worker is at work any more.
    """
    todo = [unit for unit in units if not (folder / RECEIPTS / unit.name).exists()]
    if len(todo) < len(units):
        say(f"going on: {len(units) - len(todo)} of {len(units)} units are done")
    # The longest first: a compressed file is one unit, and must not be the last to begin.
    todo.sort(key=lambda unit: -unit.bytes)
    futures = {
        pool.submit(build_unit, unit, tokenizer_sha256, settings, folder, cached): unit for unit in todo
    }
    try:
        follow(futures, sum(unit.bytes for unit in units), folder)
    except (Differs, NotProvable):
        for future in futures:
            future.cancel()
        wait(futures)
        raise


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
        if settings.keep_fraction < 1 and any(ledger.kept for ledger in ledgers.values()):
            raise UserError(
                f"--dataset-size keeps {settings.keep_fraction:.2g} of the documents, which is not one of them; ask for "
                "more tokens"
            )
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
