"""What `ekiden checkpoint list` shows: a run's checkpoints, verified to the last byte, nothing changed."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.checkpoint.manifest import Damaged, extra_files, read_manifest, verify_folder
from ekiden.errors import UserError
from ekiden.progress import human_duration

STEP_NAME = re.compile(r"step-\d{8,18}")
DAMAGED = ".damaged-"


@dataclass(frozen=True)
class CheckpointStatus:
    """One row of `ekiden checkpoint list`.

    step: None where no manifest tells it. bytes: size of its files. run: the caller's fields of the manifest.
    problem: None where every byte verified. extra: files that the manifest does not name; they are never
    read.
    """

    name: str
    step: int | None
    bytes: int
    age_seconds: float
    run: dict[str, Any]
    problem: str | None
    extra: list[str] = field(default_factory=list)


def claimed_step(path: Path) -> int:
    """Return the step that a folder claims: its manifest's, else its name's, else -1."""
    with contextlib.suppress(Damaged):
        return read_manifest(path).step
    match = re.search(r"\d+", path.name)
    return int(match[0]) if match else -1


def step_folders(folder: Path) -> list[Path]:
    """Return the checkpoints under `folder`, newest first by the step in the manifest; none is verified."""
    found = [path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (claimed_step(path), path.name), reverse=True)


def inspect_checkpoint(path: Path) -> CheckpointStatus | None:
    """Return what is known of the checkpoint in `path`, every byte verified; None where it is gone by now."""
    try:
        size = sum(entry.lstat().st_size for entry in path.iterdir()) if path.is_dir() else 0
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None  # the run that writes here removed it meanwhile
    try:
        manifest = verify_folder(path)
    except Damaged as damage:
        return CheckpointStatus(path.name, None, size, age, {}, str(damage)) if path.exists() else None
    return CheckpointStatus(
        path.name, manifest.step, size, age, manifest.run, None, extra_files(path, manifest)
    )


def list_checkpoints(folder: Path) -> list[CheckpointStatus]:
    """Verify every checkpoint under `folder`, newest first, those set aside last; nothing is changed."""
    aside = sorted(path for path in folder.iterdir() if path.name.startswith(DAMAGED))
    statuses = (inspect_checkpoint(path) for path in [*step_folders(folder), *aside])
    return [status for status in statuses if status is not None]


def format_statuses(run: Path) -> tuple[str, bool]:
    """Return the table of the checkpoints of run directory `run` (or of its `checkpoints/`, or of one alone), and whether
    one is good.

    Raises:
        UserError: there is no such folder.
    """
    rows = [_row("step", "tokens", "loss", "MB", "age", "state")]
    good = False
    for status in _asked_for(run):
        good |= status.problem is None and not status.name.startswith(DAMAGED)
        rows.append(
            _row(
                status.name if status.step is None else str(status.step),
                str(status.run.get("tokens", "-"))[:14],
                _figure(status.run.get("loss")),
                f"{status.bytes / 1e6:.1f}",
                human_duration(status.age_seconds),
                _state(status),
            )
        )
    return "\n".join(rows) if len(rows) > 1 else "there are no checkpoints", good


def _asked_for(path: Path) -> list[CheckpointStatus]:
    """Return what is known of the checkpoints that `path` stands for."""
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (folder.name == "checkpoints" or step_folders(folder)):
            return list_checkpoints(folder)
    if path.is_dir() and (STEP_NAME.fullmatch(path.name) or (path / MANIFEST).is_file()):
        status = inspect_checkpoint(path)
        return [status] if status else []
    raise UserError(f"{path} holds no checkpoints; give a run directory, the --output-dir of `ekiden train`")


def _row(*cells: str) -> str:
    widths = (10, 14, 7, 8, 7, 0)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"


def _state(status: CheckpointStatus) -> str:
    if status.problem is not None:
        return f"damaged: {status.problem}"
    aside = "verified, but set aside as " + status.name if status.name.startswith(DAMAGED) else "verified"
    return aside + (f"; ignored: {', '.join(status.extra[:5])}" if status.extra else "")
