"""What stands on a mirror: a step's files and the small object that makes them count.

That object's name carries a hash of its bytes, and every path on the mirror follows from a step and a hash, so a torn,
damaged or hostile one is found before anything that it says is used, and it cannot name a place of its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.checkpoint.folder import Checkpoint
from ekiden.checkpoint.manifest import MAX_BYTES, MAX_FILES, NAME, Damaged, check_name
from ekiden.checkpoint.mirror_files import Source
from ekiden.checkpoint.strict_json import parse_json

EXTRAS = ("history.jsonl", "config.yaml", "result.json")
IDENTITY = {"run_id": "run", "data": "token shards", "tokenizer": "tokenizer"}
"""What tells one run from another in a manifest's `run`, and how a sentence calls it."""
MAX_COMMIT_BYTES = 8 << 20
_FORMAT = "ekiden-mirror-1"
_MAX_FILE_BYTES = 2**60


@dataclass(frozen=True)
class StoredFile:
    """One file of a step on the mirror: its name there, size in bytes, SHA-256 in hex."""

    stored: str
    size: int
    sha256: str


@dataclass(frozen=True)
class MirrorState:
    """A whole step on the mirror.

    files: of the checkpoint, MANIFEST.json included, by name. extras: of the run's folder, by name. run: the facts in
    the checkpoint's manifest.
    """

    step: int
    files: dict[str, StoredFile]
    extras: dict[str, StoredFile]
    run: dict[str, Any]

    @property
    def folder(self) -> str:
        """Name of the step's folder on the mirror."""
        return hashed_name(self.step, self.files[NAME].sha256)

    @property
    def total_bytes(self) -> int:
        """Bytes of the checkpoint's files together."""
        return sum(file.size for file in self.files.values())

    def commit(self) -> tuple[str, Source]:
        """Return name and bytes of the object that makes this step count."""
        groups = {
            group: {name: [file.size, file.sha256] for name, file in sorted(stored.items())}
            for group, stored in (("files", self.files), ("extras", self.extras))
        }
        body = {"format": _FORMAT, "step": self.step, **groups, "run": self.run}
        source = Source.of((json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode())
        return f"{hashed_name(self.step, source.sha256)}.json", source


def hashed_name(step: int, sha256: str) -> str:
    """Return `step-N-HASH`."""
    return f"step-{step:08d}-{sha256[:12]}"


def parse_commit(name: str, data: bytes) -> MirrorState:
    """Return the state that the object `name` tells of.

    Raises:
        Damaged: its bytes are not those it was named after, or no mirror writes such values.
    """
    digest = hashlib.sha256(data).hexdigest()[:12]
    expected = name.removesuffix(".json").rpartition("-")[2]
    if digest != expected:
        raise Damaged(f"{name} has hash {digest}, expected {expected}")
    value = parse_json(data, name)
    if not isinstance(value, dict) or set(value) != {"format", "step", "files", "extras", "run"}:
        raise Damaged(f"{name} does not have the fields format, step, files, extras, run")
    if value["format"] != _FORMAT:
        raise Damaged(f"{name} has format {str(value['format'])[:40]!r}; this program reads {_FORMAT}")
    step, run = value["step"], value["run"]
    if type(step) is not int or hashed_name(step, digest) != name.removesuffix(".json"):
        raise Damaged(f"{name} has step {str(step)[:40]}")
    if not isinstance(run, dict):
        raise Damaged(f"{name} has a run that is not an object")
    found, extras = (_parse_files(name, group, value[group]) for group in ("files", "extras"))
    if NAME not in found or found[NAME][0] > MAX_BYTES:
        raise Damaged(f"{name} names no {NAME} of a possible size")
    return build_state(step, found, extras, run)


def _parse_files(commit: str, group: str, value: Any) -> dict[str, tuple[int, str]]:
    if not isinstance(value, dict) or len(value) > MAX_FILES + 1:
        raise Damaged(f"{commit} has {group} that are not an object of at most {MAX_FILES} names")
    for name, record in value.items():
        if group == "extras" and name not in EXTRAS:
            raise Damaged(f"{commit} names {name[:80]!r}, which no mirror restores")
        if group == "files" and name != NAME:
            check_name(name)
        match record:
            case [int(size), str(sha256)] if type(size) is int and 0 <= size < _MAX_FILE_BYTES:
                if len(sha256) == 64 and set(sha256) <= set("0123456789abcdef"):
                    continue
        raise Damaged(f"{commit} has a size or hash of {name[:80]} that cannot be one")
    return {name: (record[0], record[1]) for name, record in value.items()}


def build_state(
    step: int,
    found: Mapping[str, tuple[int, str]],
    extras: Mapping[str, tuple[int, str]],
    run: dict[str, Any],
) -> MirrorState:
    """Return the state of these files, given as (size, SHA-256) by name; where they stand follows from that."""
    folder = hashed_name(step, found[NAME][1])
    return MirrorState(
        step,
        {name: StoredFile(f"{folder}/{name}", size, sha) for name, (size, sha) in found.items()},
        {
            name: StoredFile(f"{folder}/run-{sha[:12]}-{name}", size, sha)
            for name, (size, sha) in extras.items()
        },
        run,
    )


def describe(checkpoint: Checkpoint, extras: Mapping[str, Path]) -> tuple[MirrorState, dict[str, Source]]:
    """Return what an upload of `checkpoint` makes stand, and the source of every file, by its name there.

    Raises:
        Damaged: a file is not what the manifest says; or it, or an extra, cannot be read.
    """
    data = {
        name: content for name, path in extras.items() if (content := _read_extra(name, path)) is not None
    }
    sources = {name: Source.of(content) for name, content in data.items()}
    manifest = files.read_start(checkpoint.path / NAME, MAX_BYTES + 1)
    own = {NAME: Source.of(manifest)}
    for name, record in checkpoint.manifest.files.items():
        source = Source(record.bytes, record.sha256, checkpoint.path / name)
        # What was verified when it was saved may have been damaged or cut since.
        size, sha256 = files.size_and_sha256(checkpoint.path / name, record.bytes + 1)
        if (size, sha256) != (record.bytes, record.sha256):
            raise Damaged(
                f"{checkpoint.path / name} has {size} bytes and hash {sha256}, "
                f"expected {record.bytes} and {record.sha256}"
            )
        own[name] = source
    state = build_state(
        checkpoint.step,
        {name: (source.size, source.sha256) for name, source in own.items()},
        {name: (source.size, source.sha256) for name, source in sources.items()},
        checkpoint.manifest.run,
    )
    stored = {state.files[name].stored: source for name, source in own.items()}
    return state, stored | {state.extras[name].stored: source for name, source in sources.items()}


def _read_extra(name: str, path: Path) -> bytes | None:
    """Return the bytes of an extra, a history to its last whole line, or None where there is no file."""
    assert name in EXTRAS, name
    try:
        data = files.read_start(path, path.stat().st_size)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return data[: data.rfind(b"\n") + 1] if name.endswith(".jsonl") else data


def other_run(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return in words what tells two runs apart, or an empty string; facts that one of them lacks tell nothing."""
    for key, what in IDENTITY.items():
        if key in there and key in here and there[key] != here[key]:
            return f"its {what} is {str(there[key])[:12]}, here {str(here[key])[:12]}"
    return ""
