"""The run directory: who may write in it, and the small files that say what the run is and how it ended.

`RUN/config.yaml`, `RUN/result.json` and the lock are written here; checkpoints by `checkpoint.store`, the history by
`training.history`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ekiden.checkpoint import files
from ekiden.config import TrainConfig, to_yaml
from ekiden.errors import UserError
from ekiden.progress import say

KAGGLE_OUTPUT = Path("/kaggle/working")
KAGGLE_OUTPUT_BYTES = 20_000_000_000


@dataclass
class TrainResult:
    """How a call of `train` ended; also `RUN/result.json`.

    status: completed (all steps done), paused (run the same command again) or failed; step and tokens: of the whole
    run so far; reason: what ended this call; checkpoint: name of the newest one, or None.
    """

    status: str
    step: int
    tokens: int
    reason: str
    checkpoint: str | None


class RunDirectory:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--output-dir {self.path} cannot be written ({error.strerror}); give a folder on a writable disk with space"
            ) from None
        self.history = self.path / "history.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.final_model = self.path / "final_model"
        self.microbatch = self.path / "microbatch"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory for this process.

        The kernel drops the lock when the process ends, however it ends: there are no stale ones to clear.

        Raises:
            UserError: another process trains here.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            holder = (self.path / ".lock-holder").read_text(errors="replace").strip() or "another process"
            raise UserError(
                f"--output-dir {self.path} is in use by {holder}; wait for it, stop it, or give another folder"
            ) from None
        try:
            (self.path / ".lock-holder").write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            lock.release()

    def write_microbatch(self, samples: int) -> None:
        """Leave the microbatch that the next start has to take, where this one cannot go on with a smaller one."""
        files.write_atomic(self.microbatch, str(samples).encode())

    def read_microbatch(self) -> int | None:
        """Return what `write_microbatch` left, or None."""
        try:
            text = self.microbatch.read_text().strip()
        except OSError:
            return None
        return int(text) if text.isdigit() and int(text) > 0 else None

    def write_config(self, config: TrainConfig) -> None:
        """Write `config.yaml`, complete enough to be a recipe of its own."""
        files.write_atomic(self.path / "config.yaml", to_yaml(config).encode())

    def write_result(self, result: TrainResult) -> None:
        """Write `result.json`; where the disk does not take it, say so, for the checkpoints stand without it."""
        try:
            files.write_atomic(
                self.path / "result.json", (json.dumps(asdict(result), indent=1) + "\n").encode()
            )
        except OSError as error:
            say(f"result.json could not be written ({files.reason(error)})")

    def write_failure(self, error: BaseException) -> None:
        """Leave `result.json` as failed, with what the checkpoints and the history still hold."""
        names = sorted(path.name for path in self.checkpoints.glob("step-*"))
        step = int(names[-1].removeprefix("step-")) if names else 0
        reason = str(error) or type(error).__name__
        self.write_result(TrainResult("failed", step, 0, reason, names[-1] if names else None))


def default_checkpoint_budget(checkpoints: Path) -> int | None:
    """Return the bytes that checkpoints may take where the user has set none; None: what the disk allows.

    A Kaggle session loses its whole output where `/kaggle/working` holds more than 20 GB at its end.
    """
    if not os.environ.get("KAGGLE_KERNEL_RUN_TYPE") or not checkpoints.resolve().is_relative_to(
        KAGGLE_OUTPUT
    ):
        return None
    others = sum(
        path.lstat().st_size
        for path in KAGGLE_OUTPUT.rglob("*")
        if path.is_file() and not path.is_relative_to(checkpoints.resolve())
    )
    # A tenth is left for best/, final_model/ and what the notebook itself writes later.
    return max(0, int(0.9 * KAGGLE_OUTPUT_BYTES) - others)
