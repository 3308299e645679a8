"""A folder as few flat files that Kaggle stores as they are: chunks of about 1 GB and a manifest with hashes.

Kaggle's datasets skip sub-folders, stop at 1,000 files, and take whatever looks like an archive apart (`.zip`, `.gz`,
also `.pt`). A pack is the concatenation of all files of a folder, cut into chunks named `NAME-00000.bin`; parts are runs of
chunks, a dataset each. The same folder gives the same bytes. `inputs.unpack` is the way back; `upload` sends it.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.errors import UsageError, UserError
from ekiden.kaggle.inputs import CHUNK, PACK_MANIFEST

CHUNK_BYTES = 1_000_000_000
"""Of a chunk: with parts of 5 GB five files each, and a broken upload repeats at most this much."""
MAX_PARTS = 40
"""Kaggle holds 200 GB of private data: 40 parts of 5 GB."""


@dataclass(frozen=True)
class Pack:
    """A folder as it will be packed.

    root: the folder (or the one file). manifest: what `ekiden-pack.json` says, without the number of the part.
    """

    root: Path
    manifest: dict[str, Any]

    @property
    def parts(self) -> int:
        """Number of datasets."""
        return int(self.manifest["parts"])

    @property
    def total_bytes(self) -> int:
        """Bytes of all chunks."""
        return int(sum(chunk["bytes"] for chunk in self.manifest["chunks"]))

    def part_manifest(self, part: int) -> bytes:
        """Return the manifest file of one part: the same in all but its number."""
        return (json.dumps({**self.manifest, "part": part}, indent=1, ensure_ascii=False) + "\n").encode()

    def files_of_part(self, part: int) -> dict[str, int]:
        """Return name and size of every file that the dataset of `part` must list."""
        found = {chunk["name"]: chunk["bytes"] for chunk in self.manifest["chunks"] if chunk["part"] == part}
        return {**found, PACK_MANIFEST: len(self.part_manifest(part))}


def members(root: Path) -> list[tuple[str, Path]]:
    """Return the files below `root` (or `root` itself) by their path in the pack, sorted; hidden ones are left out.

    Raises:
        UserError: there is none.
    """
    if root.is_file():
        return [(root.name, root)]
    found = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            found.append((relative.as_posix(), path))
    if not found:
        raise UserError(f"{root} holds no files; give a folder of text, token shards or a model")
    return sorted(found)


def plan_pack(root: Path, name: str, max_part_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> Pack:
    """Return how `root` will be packed: every file hashed, chunks and parts laid out.

    Raises:
        UserError: no files, or more parts than a Kaggle account holds.
        UsageError: a part would not hold one chunk.
    """
    chunk_bytes = min(chunk_bytes, max_part_bytes)
    if chunk_bytes < 1:
        raise UsageError("--max-part-size must be above 0")
    listed = members(root)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(lambda member: files.size_and_sha256(member[1]), listed))
    records: list[dict[str, Any]] = [
        {"path": path, "bytes": size, "sha256": digest} for (path, _), (size, digest) in zip(listed, hashes)
    ]
    total, per_part = sum(record["bytes"] for record in records), max(1, max_part_bytes // chunk_bytes)
    count = max(1, -(-total // chunk_bytes))
    if -(-count // per_part) > MAX_PARTS:
        raise UserError(
            f"{root} has {total / 1e9:.0f} GB, more than {MAX_PARTS} parts of {max_part_bytes / 1e9:g} GB, which is what "
            "a Kaggle account holds; choose a sample with `ekiden preprocess --dataset-size`"
        )
    chunks: list[dict[str, Any]] = [
        {
            "name": f"{name}-{number:05d}.bin",
            "bytes": min(chunk_bytes, total - number * chunk_bytes),
            "part": number // per_part + 1,
        }
        for number in range(count)
    ]
    content = json.dumps([records, chunks], sort_keys=True, ensure_ascii=False).encode()
    manifest = {
        "format": 1,
        "name": name,
        "fingerprint": hashlib.sha256(content).hexdigest(),
        "files": records,
        "chunks": chunks,
        "parts": max(chunk["part"] for chunk in chunks),
    }
    return Pack(root, manifest)


def write_part(pack: Pack, part: int, folder: Path) -> None:
    """Write the chunks and the manifest of one part into `folder`; what is whole there already stays.

    A file's modification time stands for its content: the client goes on with a broken upload where path, size and
    time are the same, and must not where only the content differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = 1_000_000_000 + int(pack.manifest["fingerprint"][:7], 16)
    wanted = [(number, c) for number, c in enumerate(pack.manifest["chunks"]) if c["part"] == part]
    for path in folder.iterdir():
        whole = path.name in {c["name"] for _, c in wanted} and int(path.stat().st_mtime) == stamp
        if not whole:
            path.unlink()
    for number, chunk in wanted:
        if not (folder / chunk["name"]).exists():
            _write_chunk(pack, number, folder / chunk["name"], stamp)
    manifest = folder / PACK_MANIFEST
    manifest.write_bytes(pack.part_manifest(part))
    os.utime(manifest, (stamp, stamp))


def _write_chunk(pack: Pack, number: int, target: Path, stamp: int) -> None:
    sizes = [chunk["bytes"] for chunk in pack.manifest["chunks"]]
    low = sum(sizes[:number])
    high, position = low + sizes[number], 0
    paths = dict(members(pack.root))
    temporary = target.with_name(f".{target.name}")
    with temporary.open("wb") as writer:
        for record in pack.manifest["files"]:
            begin, end = max(low, position), min(high, position + record["bytes"])
            if begin < end:
                _copy_range(paths, record, begin - position, end - begin, writer, pack.root)
            position += record["bytes"]
    os.utime(temporary, (stamp, stamp))
    temporary.replace(target)


def _copy_range(
    paths: dict[str, Path], record: dict[str, Any], offset: int, count: int, writer: Any, root: Path
) -> None:
    """Append `count` bytes of one file; a file of another size than planned is refused, one of other content is found
    by the leg, whose hashes are those of the plan."""
    path = paths.get(record["path"])
    if path is None or path.stat().st_size != record["bytes"]:
        raise UserError(f"{root}/{record['path']} changed while it was packed; run again")
    with path.open("rb") as reader:
        reader.seek(offset)
        while count and (data := reader.read(min(CHUNK, count))):
            writer.write(data)
            count -= len(data)
