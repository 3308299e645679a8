"""A run directory as plain figures for a page: curves, sessions, marks, mixture, checkpoints, samples, settings.

Reads `history.jsonl` as it grows, `result.json`, `config.yaml` and the manifests of the checkpoints; writes nothing.
Whatever is missing or damaged is left out: a report of half a run is better than none.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from array import array
from pathlib import Path
from typing import Any

import yaml

from ekiden.checkpoint.listing import DAMAGED, step_folders
from ekiden.checkpoint.manifest import Damaged, read_manifest
from ekiden.errors import UserError
from ekiden.report.reduce import POINTS, reduce_curve
from ekiden.report.sessions import Sessions
from ekiden.training.history import HistoryTail

TRAIN_FIELDS = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "tokens")
SAMPLE_SETS = 40
"""Sets of sample texts shown at most: the first, the last, and the others evenly spread."""
ALIVE_SECONDS = 120.0
"""A run without a result whose history grew this recently is taken to be running."""

Curve = dict[str, list]


class RunReader:
    """The figures of one run, kept up with a history that is being written.

    Raises:
        UserError: `path` is not a run directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "history.jsonl").is_file():
            raise UserError(
                f"{path} holds no history.jsonl; give a run directory, the --output-dir of `ekiden train`"
            )
        self._tail = HistoryTail(self.path / "history.jsonl")
        self._restart()

    def _restart(self) -> None:
        self.train = {name: array("d") for name in (*TRAIN_FIELDS, "mfu")}
        self.evaluations: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.sessions = Sessions()

    def update(self) -> bool:
        """Read what was written since; return whether there was anything."""
        generation, any_new = self._tail.generation, False
        for record in self._tail.read():
            if self._tail.generation != generation:
                generation = self._tail.generation
                self._restart()
            any_new = True
            kind = record.get("kind")
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                if kind == "train":
                    self._add_train(record)
                elif kind == "eval":
                    self.evaluations.append(record)
                elif kind == "samples":
                    self.samples.append(record)
                elif kind == "event":
                    self.sessions.event(record)
                self.sessions.seen(record)
        return any_new

    def _add_train(self, record: dict[str, Any]) -> None:
        values = {name: float(record.get(name, math.nan)) for name in TRAIN_FIELDS}
        values["mfu"] = self.sessions.mfu(values["tokens_per_second"])
        for name, value in values.items():
            self.train[name].append(value)

    # -- what is shown ----------------------------------------------------------------------------------------

    def data(self, points: int = POINTS) -> dict[str, Any]:
        """Return everything as JSON values; curves of at most `points` points, sizes in bytes, times in seconds."""
        result = _read_json(self.path / "result.json")
        last = self.train["step"][-1] if self.train["step"] else 0
        config = self._config()
        return {
            "name": self.path.resolve().name,
            "written": time.time(),
            "status": self._status(result),
            "step": int(last),
            "max_steps": self.sessions.max_steps,
            "tokens": _last(self.train["tokens"]),
            "loss": _last(self.train["loss"]),
            "records": len(self.train["step"]),
            "points": points,
            "preset": config.get("preset", ""),
            "model": self.sessions.model,
            "curves": self._curves(points),
            "evaluation": self._evaluation_curves(),
            "sessions": self.sessions.rows(),
            "marks": self.sessions.marks,
            "mixture": self.sessions.mixture_rows(int(last)),
            "checkpoints": self.checkpoints(),
            "samples": self._samples(),
            "config": {name: json.dumps(value, ensure_ascii=False) for name, value in config.items()},
        }

    def _status(self, result: dict[str, Any]) -> str:
        """Return completed, paused, failed, running or interrupted; a result older than the last session is stale."""
        open_session = self.sessions.open_session()
        if not open_session and result.get("status"):
            return (
                f"{result['status']}: {result['reason']}" if result.get("reason") else str(result["status"])
            )
        return "interrupted" if self.is_silent() else "running"

    def is_silent(self) -> bool:
        """Return whether nothing was written for so long that the run is taken to have been killed."""
        try:
            return time.time() - (self.path / "history.jsonl").stat().st_mtime > ALIVE_SECONDS
        except OSError:
            return True

    def _curves(self, points: int) -> dict[str, Curve]:
        curves = {}
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "mfu"):
            x, y = reduce_curve(self.train["step"], self.train[name], points)
            if any(value is not None for value in y):
                curves[name] = {"x": x, "y": y}
        return curves

    def _evaluation_curves(self) -> dict[str, dict[str, Curve]]:
        """Return {"loss" | "bits_per_byte": {LANG: curve}}, and the mean of languages under "macro"."""
        curves: dict[str, dict[str, Curve]] = {"loss": {}, "bits_per_byte": {}}
        for record in self.evaluations:
            named = {**record.get("languages", {})}
            if len(named) > 1:
                named["mean of languages"] = record.get("macro") or {}
            for language, figures in named.items():
                for figure, by_language in curves.items():
                    value = figures.get(figure)
                    if isinstance(value, (int, float)):
                        curve = by_language.setdefault(language, {"x": [], "y": []})
                        curve["x"].append(record["step"])
                        curve["y"].append(float(f"{value:.6g}"))
        return curves

    def _samples(self) -> list[dict[str, Any]]:
        """Return [{"step", "languages": {LANG: [{"prompt", "text"}]}}] of at most SAMPLE_SETS steps."""
        count = len(self.samples)
        if count > SAMPLE_SETS:
            chosen = sorted({round(i * (count - 1) / (SAMPLE_SETS - 1)) for i in range(SAMPLE_SETS)})
        else:
            chosen = list(range(count))
        return [
            {"step": self.samples[i]["step"], "languages": self.samples[i].get("languages", {})}
            for i in chosen
        ]

    def checkpoints(self) -> list[dict[str, Any]]:
        """Return a row for each checkpoint, best and final model: by manifest and file sizes, bytes are not hashed."""
        rows = []
        folder = self.path / "checkpoints"
        with contextlib.suppress(OSError):
            if folder.is_dir():
                aside = sorted(path for path in folder.iterdir() if path.name.startswith(DAMAGED))
                rows = [checkpoint_row(path) for path in [*step_folders(folder), *aside]]
        rows += [
            checkpoint_row(self.path / name)
            for name in ("best", "final_model")
            if (self.path / name).is_dir()
        ]
        return rows

    def _config(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, yaml.YAMLError):
            value = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
            return value if isinstance(value, dict) else {}
        return {}


def checkpoint_row(path: Path) -> dict[str, Any]:
    """Return {"name", "step", "bytes", "time", "loss", "state"} of a checkpoint folder."""
    row: dict[str, Any] = {"name": path.name, "step": None, "bytes": 0, "time": None, "loss": None}
    try:
        row["bytes"] = sum(entry.lstat().st_size for entry in path.iterdir())
        row["time"] = path.stat().st_mtime
        manifest = read_manifest(path)
    except Damaged as problem:
        return row | {"state": str(problem)}
    except OSError:
        return row | {"state": "gone meanwhile"}
    row |= {"step": manifest.step, "loss": manifest.run.get("loss")}
    state = "set aside as damaged" if path.name.startswith(DAMAGED) else "complete"
    return row | {"state": state}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _last(values: array[float]) -> float | None:
    return values[-1] if values and math.isfinite(values[-1]) else None
