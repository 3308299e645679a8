"""Uploads beside training: one thread, one upload in flight, the newest checkpoint next, no failure lost.

The loop hands over every checkpoint that was saved and asks at a later step what became of the uploads. What is uploaded
or waits for it is protected from the store's retention. The thread does not keep the process alive: an upload that is
cut off leaves the mirror as it was.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from ekiden.checkpoint.folder import Checkpoint
from ekiden.checkpoint.mirror import Mirror


class MirrorUploader:
    """Uploads one checkpoint at a time in a thread of its own; to be used from any thread.

    Args:
        mirror: where to.
        extras: files of the run's folder that go with each, by name.
        protected: the store's set of steps that must not be removed.
    """

    def __init__(self, mirror: Mirror, extras: Mapping[str, Path], protected: set[int]) -> None:
        self.mirror, self.extras = mirror, dict(extras)
        self._protected = protected
        self._state = threading.Condition()
        self._waiting: Checkpoint | None = None
        self._current: Checkpoint | None = None
        self._closed = False
        self._failures: deque[BaseException] = deque()
        # Now and not at each upload: where memory is short, a thread that cannot begin is waited for without end.
        threading.Thread(target=self._work, name="mirror-upload", daemon=True).start()

    def submit(self, checkpoint: Checkpoint) -> None:
        """Have `checkpoint` uploaded next, in place of one that waits; never blocks."""
        with self._state:
            self._replace(waiting=checkpoint)
            self._state.notify_all()

    def _replace(self, waiting: Checkpoint | None) -> None:
        """Set what waits, and protect just what waits and what is in flight; the lock is held."""
        if self._waiting is not None:
            self._protected.discard(self._waiting.step)
        self._waiting = waiting
        self._protected.update(one.step for one in (self._waiting, self._current) if one is not None)

    def _work(self) -> None:
        while (checkpoint := self._next()) is not None:
            try:
                self.mirror.upload(checkpoint, self.extras)
            except BaseException as error:  # whatever it was, the loop has to hear of it
                self._failures.append(error)

    def _next(self) -> Checkpoint | None:
        """Return what to upload, after waiting for it; None: there will be no more."""
        with self._state:
            if self._current is not None:
                self._protected.discard(self._current.step)
                self._current = None
                self._replace(self._waiting)
            self._state.notify_all()
            while self._waiting is None and not self._closed:
                self._state.wait()
            self._current, waiting = self._waiting, self._waiting
            self._replace(waiting=None)
            return waiting

    @property
    def busy(self) -> bool:
        """Whether an upload is in flight or waits."""
        with self._state:
            return self._busy

    @property
    def _busy(self) -> bool:
        return self._waiting is not None or self._current is not None

    def failures(self) -> list[BaseException]:
        """Return the errors of uploads that failed since the last call, oldest first."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for what was handed over; return whether all of it is done."""
        end = time.monotonic() + timeout
        with self._state:
            while self._busy and (left := end - time.monotonic()) > 0:
                self._state.wait(left)
            return not self._busy

    def close(self) -> None:
        """Drop what waits, and end the thread after what is in flight; nothing may be handed over after.

        What is in flight may be left: cut off, it leaves the mirror with the step that it holds.
        """
        with self._state:
            self._replace(waiting=None)
            self._closed = True
            self._state.notify_all()
