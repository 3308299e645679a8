"""What a tracker is, and the three there are.

Each sends a train or eval record of the history to another program. The packages are imported on first use, in the
tracker's own thread.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ekiden.config import TrainConfig
from ekiden.optional import check_installed
from ekiden.training.trackers.wandb_offline import logged_steps

SETTLE_SECONDS = 1.2
"""trackio writes what it was given within half a second, and has no call that waits for it. Records are noted as sent this
long after: killed before, a process sends them once more, and loses none."""


class Tracker(Protocol):
    """Something that takes figures. Any exception ends it, and nothing else."""

    def has(self, kind: str, step: int) -> bool | None:
        """Return whether a record had arrived when this session began; None: what was noted as sent decides."""

    def send(self, record: dict[str, Any]) -> None:
        """Take one train or eval record."""

    def settle(self) -> None:
        """Return when what was sent would outlive this process."""

    def close(self) -> None:
        """Send what is left."""


class WandbTracker:
    """One Weights & Biases run, continued over interruptions by its id.

    The step is a metric of its own: wandb's counter refuses a step below the last one, and counts from 0 in every
    offline session.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=run_dir.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=dataclasses.asdict(config),
        )
        self._run.define_metric("*", step_metric="step")
        # A killed process loses what wandb's had in hand: the last 32 KB of an offline file, or what was on its way.
        self._logged = logged_steps(run_dir / "wandb", run_id) if self._run.offline else None

    def has(self, kind: str, step: int) -> bool | None:
        """Return whether it arrived: offline by the files of the run, else by the last step the server holds."""
        if self._logged is not None:
            return step in self._logged[kind]
        return step <= (self._run.summary.get(f"{kind}/step") or -1) if self._run.resumed else None

    def send(self, record: dict[str, Any]) -> None:
        """Log the record's figures, with its step as a metric of its kind."""
        self._run.log({"step": record["step"], f"{record['kind']}/step": record["step"], **figures(record)})

    def settle(self) -> None:
        """Do nothing: the next session asks what arrived."""

    def close(self) -> None:
        """End the run, which waits for what is on its way."""
        self._run.finish()


class TensorBoardTracker:
    """Event files in `RUN/tensorboard`; each session adds one."""

    def __init__(self, config: TrainConfig, run_dir: Path, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))  # type: ignore[no-untyped-call]

    def has(self, kind: str, step: int) -> bool | None:
        """Return None: what was noted as sent decides."""
        return None

    def send(self, record: dict[str, Any]) -> None:
        """Write a scalar for each figure, at the time of the record."""
        for name, value in figures(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def settle(self) -> None:
        """Hand the events to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class TrackioTracker:
    """One trackio run, in its local database (`TRACKIO_DIR`) or where its environment variables say."""

    def __init__(self, config: TrainConfig, run_dir: Path, run_id: str) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=config.wandb_project,
            name=f"{run_dir.resolve().name}-{run_id}",
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            config=dataclasses.asdict(config),
        )

    def has(self, kind: str, step: int) -> bool | None:
        """Return None: what was noted as sent decides."""
        return None

    def send(self, record: dict[str, Any]) -> None:
        """Log the record's figures at its step."""
        self._run.log(figures(record), step=record["step"])

    def settle(self) -> None:
        """Wait as long as trackio takes to write."""
        time.sleep(SETTLE_SECONDS)

    def close(self) -> None:
        """End the run, which writes what is left."""
        self._run.finish()


TRACKERS: dict[str, Callable[[TrainConfig, Path, str], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
}


def require_packages(names: list[str]) -> None:
    """Refuse trackers whose package is missing, before anything is trained.

    Raises:
        UserError: one is.
    """
    for name in names:
        check_installed(name, f"--trackers {name}", extra=name)


def figures(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record as 'eval/languages/hindi/loss': number."""
    return _flat({k: v for k, v in record.items() if k not in ("step", "time")}, str(record["kind"]))


def _flat(value: dict[str, Any], prefix: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}/{name}")
        elif item in ("nan", "inf", "-inf"):
            flat[f"{prefix}/{name}"] = float(item)
        elif isinstance(item, (int, float)):
            flat[f"{prefix}/{name}"] = item
    return flat
