"""The output folder of a build: locked while it is written, told from any other build's, taken up where it was left.

`.build` says what the build is of; `dataset.json` is written last, so a folder without it is an unfinished build and
is never taken for data.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from ekiden.checkpoint import files
from ekiden.errors import UserError
from ekiden.progress import say
from ekiden.tokenizer.load import Tokenizer
from ekiden.tokens.format import Shard, TokenDataset
from ekiden.tokens.units import Unit, difference

RECEIPTS, TOKENIZER, MARKER, LOCK = ".receipts", "tokenizer", ".build", ".lock"


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


def number_shard(folder: Path, shard: Shard, name: str) -> None:
    """Give a unit's shard its final name, numbered without gaps; one that a killed build had named is left as it is."""
    for suffix in (".bin", ".idx"):
        if (folder / (shard.name + suffix)).exists():
            files.rename(folder / (shard.name + suffix), folder / (name + suffix))
    shard.name = name
