"""Saving beside training: one thread, at most one save in flight, no failure lost.

The loop submits the work of writing a snapshot and asks at the next step what became of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundSaver:
    """Runs one save at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failures: list[BaseException] = []

    def submit(self, save: Callable[[], None]) -> None:
        """Start `save`, after waiting for the one before it."""
        self.wait()

        def work() -> None:
            try:
                save()
            except BaseException as error:
                self._failures.append(error)

        self._thread = threading.Thread(target=work, name="checkpoint-save")
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
        """Return the errors of saves that failed since the last call."""
        failures, self._failures = self._failures, []
        return failures
