"""What a worker of a build does: one unit of the corpus into one pair of shards a split, and a receipt.

`build` sends units here, to whatever process runs them; everything a worker knows beside its arguments lies in the
output folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ekiden.checkpoint import files
from ekiden.corpus.cleaning import Cleaner
from ekiden.corpus.documents import divide, read_documents
from ekiden.corpus.ledger import Ledger
from ekiden.corpus.script import ScriptTally
from ekiden.errors import UserError
from ekiden.tokenizer.load import Tokenizer, load_tokenizer
from ekiden.tokens.dedupe import Window, dropped
from ekiden.tokens.encoders import exact_encoder
from ekiden.tokens.exact import Encoder, check
from ekiden.tokens.format import SPLITS, ShardWriter, token_dtype
from ekiden.tokens.output_folder import RECEIPTS, TOKENIZER
from ekiden.tokens.units import Settings, Unit, split_of

BATCH_BYTES = 1 << 20
"""Text encoded in one call: enough to keep the call's cost small, little enough to bound a worker's memory."""

CHECKED_TEXTS, CHECKED_CHARACTERS = 8, 2000
"""Of every unit compared with the tokenizer where a cache gives the ids: 16 KB of 4 MB, 2 % of the time."""

NOTE_SECONDS = 0.5
"""Between two notes of how far a unit is, which the build's progress shows."""


def start_worker(first: Callable[[], object] | None = None) -> None:
    """Prepare a worker process: one thread for each, and it ends when the build is killed.

    The pool's workers would otherwise wait for ever, and write beside those of the next build.

    Args:
        first: called before there is work; what it raises shows again when the work needs it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if first is not None:
        with contextlib.suppress(Exception):
            first()


@contextlib.contextmanager
def worker_processes(
    most: int, num_proc: int | None, kept: str = "", first: Callable[[], object] | None = None
) -> Iterator[Executor]:
    """Yield `num_proc` worker processes (None: one a core), at most `most`.

    Args:
        kept: what a second run of the command need not do again, to stand in the sentence.
        first: called in every worker before there is work.

    Raises:
        UserError: one of them died.
    """
    workers = max(1, min(num_proc or len(os.sched_getaffinity(0)), most))
    # spawn: a forked worker would inherit locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(first,))
    try:
        pool.submit(
            os.getpid
        )  # starts them all: half a second of imports and `first`, while the caller goes on
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended before its work was done (killed for memory?); run the same command again with a lower "
            f'--num-proc{kept} (a script of your own needs `if __name__ == "__main__":` around it)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=1)
def worker_tokenizer(folder: Path, sha256: str) -> Tokenizer:
    """Return the tokenizer that lies in `folder`, opened once in a worker."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer.sha256 == sha256
    return tokenizer


@functools.lru_cache(maxsize=1)
def worker_cache(folder: Path, sha256: str) -> Encoder:
    """Return the exact encoder before the tokenizer in `folder`; what it has learnt stays from unit to unit."""
    return exact_encoder(worker_tokenizer(folder, sha256))


def build_unit(
    unit: Unit, tokenizer_sha256: str, settings: Settings, folder: Path, cached: bool = False
) -> dict[str, int]:
    """Turn one unit into its shards, leave a receipt, and return its documents and tokens. Runs in a worker.

    Args:
        cached: an exact encoder gives the ids.

    Raises:
        Differs: not the tokenizer's, as the beginning of the unit showed.
        NotProvable: this machine has no such encoder.
    """
    tokenizer = worker_tokenizer(folder / TOKENIZER, tokenizer_sha256)
    cache = worker_cache(folder / TOKENIZER, tokenizer_sha256) if cached else None
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
    for number, (batch, position) in enumerate(batches_of(unit, ledger, settings, cleaner, window)):
        texts = [text for text, _bytes, _split in batch]
        if cache is not None and number == 0:
            check(cache, tokenizer, [text[:CHECKED_CHARACTERS] for text in texts[:CHECKED_TEXTS]])
        for (_text, text_bytes, split), ids in zip(batch, (cache or tokenizer).encode_batch(texts)):
            writers[split].add(np.concatenate([before, ids.astype(dtype), after]), text_bytes)
        done = {name: sum(getattr(writer, name) for writer in writers.values()) for name in done}
        if time.monotonic() - noted > NOTE_SECONDS:
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
) -> Iterator[tuple[list[tuple[str, int, str]], int]]:
    """Yield (list of (text, its UTF-8 bytes, split) of about BATCH_BYTES, input bytes read), without what the sample leaves out.

    Split and sample go by two independent hashes of the text, so they depend on nothing but the document; the
    documents that a long text is divided into stay together.
    """
    share = settings.test_split[unit.language]
    keep_below = int(settings.keep_fraction * 2**64)
    batch: list[tuple[str, int, str]] = []
    size = position = 0
    for text, position in documents_of(unit, ledger, settings):
        data = text.encode()
        if settings.keep_fraction < 1 and xxhash.xxh3_64_intdigest(data, seed=1) >= keep_below:
            continue
        split = split_of(data, share)
        window.note(data, cleaner.passed - 1, split == "test")
        pieces = divide(text)
        ledger.divided += len(pieces) - 1
        sizes = [len(data)] if len(pieces) == 1 else [len(piece.encode()) for piece in pieces]
        del text, data
        for piece, piece_bytes in zip(pieces, sizes):
            batch.append((piece, piece_bytes, split))
            size += len(piece)
            if size >= BATCH_BYTES:
                yield batch, position
                batch, size = [], 0
    if batch:
        yield batch, position
