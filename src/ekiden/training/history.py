"""`history.jsonl`: one JSON object a line for everything that happened in a run.

The loop appends; reports, notebooks and trackers read. Floats are written in full precision (repr), so that two
histories can be compared to the last bit. After a resume the file continues from the checkpoint's step: records of
later steps are taken out (no step stands twice) and kept in memory, to be compared with the steps as they are done
again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.progress import say
from ekiden.values import finite_json

STEP_KINDS = ("train", "eval", "samples")
"""Records that belong to a step; events belong to the session that met them and are never taken out."""


class History:
    """The history of the run in `path`, opened for appending at `step`.

    Args:
        path: `RUN/history.jsonl`.
        step: records of steps after this one are taken out.

    Attributes:
        replaced: loss of each training record taken out, by step.
        last: step of the newest record of each kind.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.replaced: dict[int, float] = {}
        self.last: dict[str, int] = {}
        self._waiting: list[bytes] = []
        self._open(step)

    def _open(self, step: int) -> None:
        path, kept = self.path, []
        for record in read_history(path):
            if record.get("kind") in STEP_KINDS and record["step"] > step:
                if record["kind"] == "train":
                    self.replaced[record["step"]] = record["loss"]
            else:
                kept.append(record)
                self.last[record["kind"]] = record["step"]
        lines = "".join(_line(record) for record in kept).encode()
        if not path.exists() or path.read_bytes() != lines:
            files.write_atomic(path, lines)
        self._file = path.open("ab", buffering=0)
        self._end = len(lines)

    def add(self, kind: str, step: int, **figures: Any) -> dict[str, Any]:
        """Append one record and return it; where the disk is full, it waits in memory for the next one."""
        record = {"kind": kind, "step": step, **figures, "time": time.time()}
        self._waiting.append(_line(record).encode())
        self._write_waiting()
        self.last[kind] = step
        return record

    def _write_waiting(self) -> None:
        data = b"".join(self._waiting)
        try:
            # A short write is a full disk's; the next one begins where the last whole line ended.
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            if len(self._waiting) == 1:
                say(f"{self.path.name} cannot be written ({files.reason(error)}); its records wait in memory")
            return
        self._end += len(data)
        self._waiting.clear()

    def event(self, event: str, step: int, **details: Any) -> None:
        """Append an event: start, resume, time, oom, skip, rollback, save-failed, stop."""
        self.add("event", step, event=event, **details)

    def sync(self) -> None:
        """Make the records so far durable, before the checkpoint that they lead to.

        A disk that cannot is about to fail that checkpoint, which says so.
        """
        with contextlib.suppress(OSError):
            files.sync_file(self._file.fileno(), self.path)

    def close(self) -> None:
        """Close the file and write `training_history.json` beside it, the same figures as columns."""
        if self._waiting:
            self._write_waiting()
        self._file.close()
        columns = json.dumps(finite_json(history_columns(read_history(self.path))), ensure_ascii=False)
        try:
            files.write_atomic(self.path.with_name("training_history.json"), columns.encode())
        except OSError as error:
            say(
                f"training_history.json could not be written ({files.reason(error)}); history.jsonl holds the same"
            )


class UnwrittenHistory(History):
    """The history on a rank that does not write it: records are returned, and lead nowhere.

    Args:
        last: what the writing rank's `last` says, for what is done next has to be the same on all.
    """

    def __init__(self, path: Path, last: dict[str, int]) -> None:
        super().__init__(path, 0)
        self.last = last

    def _open(self, step: int) -> None:
        pass

    def _write_waiting(self) -> None:
        self._waiting.clear()

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _line(record: dict[str, Any]) -> str:
    return json.dumps(finite_json(record), ensure_ascii=False) + "\n"


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a history; a line torn by a kill ends it silently, for its step will be done again."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = parse_record(line)
            if record is not None:
                yield record


class HistoryTail:
    """The records of a history that is being written, as they come; a line is given once it is whole.

    Where the file was replaced (a resume or a roll-back takes records out), it is read again from its beginning.

    Attributes:
        generation: how often it was begun at its beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self._inode, self._offset = 0, 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the records written since the last call."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._inode, self._offset = facts.st_ino, 0
                self.generation += 1
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                record = parse_record(line)
                if record is not None:
                    yield record


def parse_record(line: bytes | str) -> dict[str, Any] | None:
    """Return the record in a line of a history, or None where it holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def history_columns(records: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Return the training and evaluation records as columns, for plotting.

    Returns:
        {"train": {"step": [...], "loss": [...], ...}, "eval": {"step": [...], "macro_loss": [...],
        "languages": {LANG: {"step": [...], "loss": [...], ...}}}, "events": [...]}
    """
    train: dict[str, list[Any]] = {}
    evaluation: dict[str, Any] = {"step": [], "macro_loss": [], "languages": {}}
    events = []
    for record in records:
        if record["kind"] == "train":
            for name, value in record.items():
                if name != "kind":
                    train.setdefault(name, []).append(value)
        elif record["kind"] == "eval":
            evaluation["step"].append(record["step"])
            evaluation["macro_loss"].append(record.get("macro", {}).get("loss"))
            for language, figures in record["languages"].items():
                columns = evaluation["languages"].setdefault(language, {})
                for name, value in {"step": record["step"], **figures}.items():
                    columns.setdefault(name, []).append(value)
        elif record["kind"] == "event":
            events.append(record)
    return {"train": train, "eval": evaluation, "events": events}
