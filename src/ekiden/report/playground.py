"""Text from any checkpoint of a run, for the dashboard: one model in memory at a time.

torch is imported on the first prompt. The model runs on the CPU unless the user says otherwise: a training on the same
machine needs the device's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekiden.errors import UserError
from ekiden.report.reading import RunReader

MOST_TOKENS = 1000


class Playground:
    """Generates for one request at a time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._key: tuple[Path, float] | None = None
        self._loaded: Any = None

    def answer(self, run: RunReader | None, asked: dict[str, Any]) -> Iterator[str]:
        """Return the continuation of `asked["prompt"]` by `asked["checkpoint"]` of `run`, in pieces.

        Raises:
            UserError: no such checkpoint, or one that cannot be loaded; a setting out of range.
        """
        from ekiden.generation import Sampling, stream

        names = [row["name"] for row in run.checkpoints() if row["state"] == "complete"] if run else []
        name = asked["checkpoint"]
        if run is None or name not in names:
            raise UserError(f"checkpoint {name} is not there any more; choose another")
        folder = run.path / name if name in ("best", "final_model") else run.path / "checkpoints" / name
        sampling = Sampling(
            max_new_tokens=min(int(asked.get("max_new_tokens", 64)), MOST_TOKENS),
            temperature=float(asked.get("temperature", 0.8)),
            seed=int(asked.get("seed", 0)),
        )
        return self._pieces(folder, str(asked["prompt"]), sampling, stream)

    def _pieces(self, folder: Path, prompt: str, sampling: Any, stream: Any) -> Iterator[str]:
        with self._lock:
            loaded = self._load(folder)
            yield from stream(loaded.model, loaded.tokenizer, prompt, sampling)

    def _load(self, folder: Path) -> Any:
        from ekiden.export.load import load_model

        key = (folder.resolve(), folder.stat().st_mtime)
        if key != self._key:
            self._key = self._loaded = None
            self._loaded = load_model(folder, device=self.device)
            self._key = key
        return self._loaded
