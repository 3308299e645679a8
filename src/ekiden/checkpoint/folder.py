"""One folder of files with a manifest: written whole and durable, replaced atomically, read only where
verified.

`store` numbers and bounds such folders as checkpoints; `best/` and `final_model/` are single ones, replaced
in place.

torch is imported where tensors are read or written: a conversion, which needs none, should not take its 200 MB.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekiden.checkpoint import files
from ekiden.checkpoint.header import read_header
from ekiden.checkpoint.manifest import (
    NAME,
    Damaged,
    FileRecord,
    Hashes,
    Manifest,
    check_name,
    describe_tensors,
    parse_manifest,
    verify_folder,
)
from ekiden.checkpoint.strict_json import parse_json
from ekiden.errors import UserError

if TYPE_CHECKING:
    import torch

MAX_JSON_BYTES = 64 << 20


class CheckpointError(Exception):
    """A folder could not be written, for want of space or for a failing disk; what was there before stays.

    The trainer catches it, says it and goes on.
    """


class CheckpointWriter:
    """The files of one checkpoint, as they are written into its temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, FileRecord] = {}

    def tensors(
        self, filename: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """Write tensors as a safetensors file."""
        from ekiden.checkpoint.tensors import write_tensors

        check_name(filename)
        self.records[filename] = write_tensors(self.folder / filename, tensors, metadata)

    def json(self, filename: str, value: Any) -> None:
        """Write a JSON file; floats keep every bit, NaN and infinities included."""
        self.bytes(filename, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def bytes(self, filename: str, data: bytes) -> None:
        """Write a file."""
        self._stream(filename, [data])

    def copy(self, source: Path, filename: str) -> None:
        """Write a copy of the regular file `source`."""
        self._stream(filename, files.read_chunks(source))

    def _stream(self, filename: str, chunks: Any) -> None:
        check_name(filename)
        hashes = Hashes()
        with files.DurableFile(self.folder / filename) as file:
            for chunk in chunks:
                hashes.update(chunk)
                file.write(chunk)
        self.records[filename] = hashes.record()


Write = Callable[[CheckpointWriter], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been verified."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Verify the checkpoint in `path` and return it.

        Raises:
            UserError: it is damaged, or not a checkpoint.
        """
        try:
            return cls(path, verify_folder(path))
        except Damaged as damage:
            raise UserError(
                f"{path} is not a good checkpoint: {damage}; choose another, or --resume-from auto"
            ) from None

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.manifest.step

    def tensors(self, filename: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one of its files.

        Raises:
            UserError: there is no such file among the verified ones, or it can no longer be read.
        """
        from ekiden.checkpoint.tensors import read_tensors

        return self._read(filename, read_tensors)

    def json(self, filename: str) -> Any:
        """Return the value of one of its JSON files.

        Raises:
            UserError: as `tensors`.
        """
        return self._read(filename, _read_json)

    def _read(self, filename: str, read: Callable[[Path], Any]) -> Any:
        # A file that the manifest does not name was never verified, whoever put it there.
        if filename not in self.manifest.files:
            raise UserError(
                f"{self.path} holds no {filename}; it was not written by `ekiden train`, choose another"
            )
        try:
            return read(self.path / filename)
        except Damaged as damage:
            problem = str(damage)
        except OSError as error:
            problem = f"{filename} cannot be read: {files.reason(error)}"
        raise UserError(
            f"{self.path} is not a good checkpoint: {problem}; choose another, or --resume-from auto"
        )


def _read_json(path: Path) -> Any:
    data = files.read_start(path, MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise Damaged(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    return parse_json(data, path.name, allow_nan=True)


def write_folder(folder: Path, write: Write, step: int, run: dict[str, Any]) -> Manifest:
    """Write a new folder with its manifest last, all of it durable, not yet under its final name.

    What was written is read by the parsers that a resume will use, before it counts.

    Raises:
        OSError: the disk is full or fails.
        Damaged, ValueError: `write` or `run` gave what those parsers refuse.
    """
    files.make_folder(folder)
    writer = CheckpointWriter(folder)
    write(writer)
    for name, record in writer.records.items():
        if record.tensors is not None and describe_tensors(read_header(folder / name)) != record.tensors:
            raise Damaged(f"{name} does not hold the tensors that were written to it")
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    data = Manifest(step, writer.records, run, created).to_json()
    manifest = parse_manifest(data)
    with files.DurableFile(folder / NAME) as file:
        file.write(data)
    files.sync_folder(folder)
    return manifest


def replace_folder(target: Path, write: Write, run: dict[str, Any]) -> None:
    """Write `target` anew, whole, in place of the folder of that name.

    The new one is durable before the names are swapped, in one atomic step where the system has one;
    elsewhere the old one is renamed away first, and `recover_folder` puts it back where a power cut fell
    between the two renames.

    Args:
        write: writes its files.
        run: facts kept in the manifest; "step" becomes the manifest's step.

    Raises:
        CheckpointError: the disk is full or fails; the old folder is as it was.
    """
    temporary, old = _beside(target, "new"), _beside(target, "old")
    try:
        files.make_folders(target.parent)
        recover_folder(target)
        files.remove_tree(temporary)
        write_folder(temporary, write, int(run.get("step", 0)), run)
        if not target.exists():
            files.rename(temporary, target)
        elif not files.exchange(temporary, target):
            files.rename(target, old)
            files.rename(temporary, target)
        files.sync_folder(target.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            _put_back(target)
            files.remove_tree(temporary)
        if isinstance(error, (OSError, MemoryError)):
            raise CheckpointError(f"{target.name}/ could not be written: {files.reason(error)}") from error
        raise
    # Now neither name of the old one is looked for; what cannot be removed goes at the next replacement.
    with contextlib.suppress(OSError):
        files.remove_tree(temporary)
        files.remove_tree(old)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{kind}-{target.name}")


def _put_back(target: Path) -> None:
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        files.rename(old, target)
        files.sync_folder(target.parent)


def recover_folder(target: Path) -> None:
    """Finish or undo a replacement of `target` that was cut short; to be called before `target` is read.

    Raises:
        OSError: the folder cannot be changed.
    """
    _put_back(target)
    files.remove_tree(_beside(target, "old"))
