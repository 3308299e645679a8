"""The history, sent on to Weights & Biases where the user asks for it.

The loop hands over each record as it is written. A tracker that fails is said once and then left out: training never
stops for one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ekiden.config import TrainConfig
from ekiden.errors import UserError
from ekiden.progress import say


class WandbTracker:
    """One Weights & Biases run, continued over interruptions by its id.

    Args:
        run_dir: where wandb keeps its files; also the run's name.
        run_id: the id kept in the checkpoint; None: a new run.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, run_id: str | None) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--use-wandb needs the package: pip install 'ekiden[wandb]'") from None
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=run_dir.name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=dataclasses.asdict(config),
            )
        except Exception as error:  # a tracker never stops training
            self._fail(error)
        self.run_id: str | None = self._run.id if self._run is not None else run_id

    def log(self, record: dict[str, Any]) -> None:
        """Send a train or eval record."""
        if self._run is None or record["kind"] not in ("train", "eval"):
            return
        try:
            self._run.log(_flat(record, record["kind"]), step=record["step"])
        except Exception as error:  # a tracker never stops training
            self._fail(error)

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # a tracker never stops training
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._run = None
        say(f"wandb failed ({error}); training goes on without it")


def _flat(value: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return nested figures as 'eval/languages/hindi/loss': number."""
    flat: dict[str, float] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}/{name}")
        elif isinstance(item, (int, float)) and name not in ("step", "time"):
            flat[f"{prefix}/{name}"] = item
    return flat
