"""A tracker that follows `history.jsonl` from a thread of its own: training neither waits for it nor fails with it.

The file is the queue. What was sent is noted in `RUN/trackers/NAME.json` (or asked of the tracker), so that a later session
sends what an earlier one could not, and nothing twice: a step done again after an interruption was sent already.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ekiden.config import TrainConfig
from ekiden.config_checks import parse_trackers
from ekiden.progress import say
from ekiden.training.history import HistoryTail
from ekiden.training.trackers.base import TRACKERS, Tracker, require_packages

CLOSE_SECONDS = 30.0
"""What the trackers together may take to finish at the end of a session."""


class Follower:
    """The thread that sends a run's history to one tracker.

    Args:
        open_tracker: called in the thread with the run's id; may fail or hang.
        run_id: used where the run directory has none noted yet.
    """

    def __init__(
        self, name: str, run_dir: Path, open_tracker: Callable[[str], Tracker], run_id: str | None = None
    ) -> None:
        self.name, self._open = name, open_tracker
        self._note = run_dir / "trackers" / f"{name}.json"
        noted = self._read_note()
        self.run_id = str(noted.get("run_id") or run_id or secrets.token_hex(4))
        self.sent = {kind: int(noted.get(kind, -1)) for kind in ("train", "eval")}
        self._seen = dict.fromkeys(self.sent, -1)
        self._write_note()
        self._tail = HistoryTail(run_dir / "history.jsonl")
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that the history has grown."""
        self._wake.set()

    def finish(self) -> None:
        """Ask for the end; `join` waits for it."""
        self._closing.set()
        self._wake.set()

    def join(self, seconds: float) -> bool:
        """Return whether the tracker ended within `seconds`."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            tracker = self._open(self.run_id)
            while True:
                closing = self._closing.is_set()  # before reading: what was written until then is sent
                self._wake.clear()
                if self._send_new(tracker):
                    tracker.settle()
                    self._write_note()
                if closing:
                    break
                if not self._closing.is_set():
                    self._wake.wait()
            tracker.close()
        except BaseException as error:  # SystemExit of a library too: a tracker never stops training
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"{self.name} failed ({reason}); training goes on without it, history.jsonl keeps everything")

    def _send_new(self, tracker: Tracker) -> bool:
        """Send the records that no session sent; return whether there were any."""
        any_sent = False
        for record in self._tail.read():
            kind, step = record["kind"], record["step"]
            if kind not in self.sent or step <= self._seen[kind]:  # the second: done again after a roll-back
                continue
            self._seen[kind] = step
            arrived = tracker.has(kind, step)
            if step <= self.sent[kind] if arrived is None else arrived:
                continue
            tracker.send(record)
            self.sent[kind] = max(self.sent[kind], step)
            any_sent = True
        return any_sent

    def _read_note(self) -> dict[str, Any]:
        try:
            noted = json.loads(self._note.read_text())
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def _write_note(self) -> None:
        """Note what was sent; not fsynced, since what a killed process had written stays, and more is not needed."""
        with contextlib.suppress(OSError):
            self._note.parent.mkdir(exist_ok=True)
            new = self._note.with_suffix(".new")
            new.write_text(json.dumps({"run_id": self.run_id, **self.sent}))
            new.replace(self._note)


class Trackers:
    """All trackers of a session.

    Args:
        wandb_run_id: the id kept in the checkpoint, for a run directory that came without its notes.

    Raises:
        UserError: a tracker's package is missing.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, wandb_run_id: str | None) -> None:
        names = sorted({*parse_trackers(config.trackers), *(["wandb"] if config.use_wandb else [])})
        require_packages(names)
        self.followers = [
            Follower(
                name,
                run_dir,
                lambda run_id, name=name: TRACKERS[name](config, run_dir, run_id),  # type: ignore[misc]
                wandb_run_id if name == "wandb" else None,
            )
            for name in names
        ]

    @property
    def wandb_run_id(self) -> str | None:
        """The id to be kept in checkpoints."""
        return next((f.run_id for f in self.followers if f.name == "wandb"), None)

    def wake(self) -> None:
        """Say that the history has grown."""
        for follower in self.followers:
            follower.wake()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is left; whoever takes longer than `seconds` is left behind."""
        deadline = time.monotonic() + seconds
        for follower in self.followers:
            follower.finish()
        for follower in self.followers:
            if not follower.join(max(0.0, deadline - time.monotonic())):
                say(
                    f"{follower.name} did not finish within {seconds:.0f} seconds and is left behind; what it misses is "
                    "sent by the next session, or stands in history.jsonl"
                )
