"""Saving beside training: one thread, at most one save in flight, no failure lost.

The loop hands over the work of writing a snapshot that it has already copied, and asks at the next step what
became of it. The thread does not keep the process alive: a save that must be durable before the end is waited
for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class BackgroundSaver:
    """Runs one save at a time in a thread of its own; to be used from one thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failures: deque[BaseException] = deque()

    def submit(self, save: Callable[[], object]) -> None:
        """Start `save`, after waiting for the one before it; a failure of that one is kept for `failures`."""
        self.wait()

        def work() -> None:
            try:
                save()
            except BaseException as error:  # whatever it was, the loop has to hear of it
                self._failures.append(error)

        self._thread = threading.Thread(target=work, name="checkpoint-save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def failures(self) -> list[BaseException]:
        """Return the errors of saves that failed since the last call, oldest first."""
        return [self._failures.popleft() for _ in range(len(self._failures))]
