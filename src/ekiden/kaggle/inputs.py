"""What a leg finds among Kaggle's inputs: the packed corpus, and the output of the leg before with its checkpoints.

Both are copied to places that can be written to, every byte hashed on the way. Kaggle mounts inputs in two layouts and
sometimes an older version of them, so that everything is recognised by its hash, not by its place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ekiden.kaggle.session import Ended, read_json, say

PACK_MANIFEST = "ekiden-pack.json"
THREADS = 8
"""Read ahead of Kaggle's mounts, which give one reader 120-240 MB/s and sixteen 770-950."""
CARRIED = 2
"""Newest checkpoints taken along: the second is for the day on which the newest turns out damaged."""
CHUNK = 4 << 20


def mounts(root: Path, ref: str, kind: str) -> Iterator[Path]:
    """Yield where the input `ref` (owner/slug) of a kind (datasets, notebooks) may be: Kaggle has two layouts."""
    owner, slug = ref.split("/")[:2]
    for path in (root / "input" / kind / owner / slug, root / "input" / slug, root / "input" / owner / slug):
        if path.is_dir():
            yield path


def folders_holding(root: Path, name: str, depth: int = 5) -> Iterator[Path]:
    """Yield the input folders that hold `name`, not looking below them: a walk through all files takes minutes."""
    pending = [(root / "input", depth)]
    while pending:
        folder, left = pending.pop(0)
        if (folder / name).exists():
            yield folder
        elif left and folder.is_dir():
            below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
            pending += [(Path(path), left - 1) for path in below]


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a file, not its read-only mode; return its SHA-256."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()


# -- the checkpoint -----------------------------------------------------------------------------------------------


def checkpoints_of(run: Path) -> list[Path]:
    """Return the finished checkpoints of a run, newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / "MANIFEST.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def identity(checkpoint: Path) -> dict[str, Any]:
    """Return what tells a checkpoint from every other: its step and the hash of its manifest, which hashes the rest."""
    manifest = (checkpoint / "MANIFEST.json").read_bytes()
    return {
        "name": checkpoint.name,
        "step": int(checkpoint.name.removeprefix("step-")),
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }


def copy_checkpoint(source: Path, target: Path) -> bool:
    """Copy a checkpoint file by file, hashing; return False and leave nothing where a file is not what was saved."""
    manifest = read_json(source / "MANIFEST.json") or {}
    names = list(manifest.get("files", {}))
    half = target.with_name(f".half-{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            hashes = list(pool.map(lambda name: copy_hashed(source / name, half / name), names))
    except OSError as error:
        say(f"{source.name} cannot be read: {error}")
        hashes = []
    wrong = [n for n, h in zip(names, hashes) if manifest["files"][n]["sha256"] != h]
    if not names or len(hashes) != len(names) or wrong:
        say(f"{source.name} is damaged ({', '.join(wrong) or 'files missing'}) and is passed over")
        shutil.rmtree(half, ignore_errors=True)
        return False
    copy_hashed(source / "MANIFEST.json", half / "MANIFEST.json")
    half.replace(target)
    return True


def carry_forward(source: Path, run: Path) -> list[Path]:
    """Copy what a previous leg left in `source` to `run`: history, best model and the newest checkpoints that verify.

    Returns:
        The checkpoints copied, newest first.
    """
    skipped = {"checkpoints", "result.json", ".lock", ".lock-holder", "stop", "save"}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and relative.parts[0] not in skipped and not relative.parts[0].startswith(".new-"):
            copy_hashed(path, run / relative)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    copied: list[Path] = []
    for checkpoint in checkpoints_of(source):
        target = run / "checkpoints" / checkpoint.name
        if len(copied) < CARRIED and copy_checkpoint(checkpoint, target):
            copied.append(target)
    return copied


def take_over(root: Path, previous: str, expected: dict[str, Any], run: Path) -> Path:
    """Carry the output of leg `previous` (owner/slug) forward; return the checkpoint to go on from.

    Raises:
        Ended: it is not mounted, is an older version than `expected` names, or holds no good checkpoint.
    """
    for mount in mounts(root, previous, "notebooks"):
        newest = checkpoints_of(mount / "run")
        found = identity(newest[0]) if newest else {}
        if found.get("manifest_sha256") != expected["manifest_sha256"]:
            there = f"step {found['step']}" if found else "no checkpoint"
            raise Ended(
                "stale-input", f"{mount} holds {there}, expected step {expected['step']} of the last leg"
            )
        copied = carry_forward(mount / "run", run)
        if not copied:
            raise Ended("stale-input", f"no checkpoint in {mount} is what was saved")
        return copied[0]
    raise Ended("no-checkpoint", f"the output of {previous} is not mounted")


# -- the corpus ---------------------------------------------------------------------------------------------------


def find_pack(root: Path, refs: Iterable[str], fingerprint: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the manifest of a packed corpus and where each of its chunks is.

    Args:
        refs: datasets (owner/slug) that hold its parts; none: all inputs are looked at.
        fingerprint: of the pack; empty: the first that is found.

    Raises:
        Ended: a part is not mounted, or another version of it is.
    """
    refs = list(refs)
    folders = [path for ref in refs for path in mounts(root, ref, "datasets")]
    if not refs:
        folders = list(folders_holding(root, PACK_MANIFEST))
    manifest: dict[str, Any] | None = None
    chunks: dict[str, Path] = {}
    others = []
    for folder in folders:
        found = read_json(folder / PACK_MANIFEST)
        if not found:
            continue
        if found["fingerprint"] != (fingerprint or found["fingerprint"]):
            others.append(str(folder))
            continue
        manifest, fingerprint = found, found["fingerprint"]
        for chunk in found["chunks"]:
            path = folder / chunk["name"]
            if path.is_file() and path.stat().st_size == chunk["bytes"]:
                chunks[chunk["name"]] = path
    if manifest is None:
        if others:
            raise Ended("stale-input", f"{', '.join(others)} holds another version of the corpus")
        raise Ended("no-corpus", f"no {PACK_MANIFEST} among the inputs ({', '.join(refs) or 'all'})")
    missing = [chunk["name"] for chunk in manifest["chunks"] if chunk["name"] not in chunks]
    if missing:
        raise Ended(
            "no-corpus", f"{', '.join(missing)} of the corpus {manifest['name']} is not among the inputs"
        )
    return manifest, chunks


def unpack(manifest: dict[str, Any], chunks: dict[str, Path], target: Path) -> Path:
    """Write the files of a pack below `target`, hashed as they are written.

    Raises:
        Ended: a file is not what was packed.
    """
    bounds, begin = [], 0
    for chunk in manifest["chunks"]:
        bounds.append((begin, begin + chunk["bytes"], chunks[chunk["name"]]))
        begin += chunk["bytes"]
    starts, position = [], 0
    for record in manifest["files"]:
        starts.append(position)
        position += record["bytes"]

    def write(record: dict[str, Any], start: int) -> str | None:
        """Write one file, of whose bytes the first is number `start` of the pack; return what is wrong with it."""
        parts = Path(record["path"]).parts
        if not parts or Path(record["path"]).is_absolute() or ".." in parts:
            return f"{record['path']!r} is not a path below the pack"
        path, digest, end = target.joinpath(*parts), hashlib.sha256(), start + record["bytes"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as writer:
            for low, high, chunk in bounds:
                if low >= end or high <= start:
                    continue
                with chunk.open("rb", buffering=0) as reader:
                    reader.seek(max(start, low) - low)
                    left = min(end, high) - max(start, low)
                    while left and (data := reader.read(min(CHUNK, left))):
                        digest.update(data)
                        writer.write(data)
                        left -= len(data)
        return None if digest.hexdigest() == record["sha256"] else f"{record['path']} is damaged"

    with ThreadPoolExecutor(THREADS) as pool:
        problems = [problem for problem in pool.map(write, manifest["files"], starts) if problem]
    if problems:
        raise Ended("stale-input", f"the corpus cannot be used: {problems[0]}")
    return target
