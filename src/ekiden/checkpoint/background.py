"""Saving beside training: one thread, at most one save in flight, no failure lost.

The loop hands over the work of writing a snapshot that it has already copied, and asks at the next step what
became of it. The thread does not keep the process alive: a save that must be durable before the end is waited
for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue


class BackgroundSaver:
    """Runs one save at a time in a thread of its own; to be used from one thread.

    The thread is started here and not at each save: where memory is short, Python's `Thread.start` waits for ever for
    a thread that could not begin (found by the memory sweep of the fault campaign).
    """

    def __init__(self) -> None:
        self._saves: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._failures: deque[BaseException] = deque()
        threading.Thread(target=self._run, name="checkpoint-save", daemon=True).start()

    def _run(self) -> None:
        while (save := self._saves.get()) is not None:
            try:
                save()
            except BaseException as error:  # whatever it was, the loop has to hear of it
                self._failures.append(error)
            finally:
                del save  # and with it the copy of the state
                self._idle.set()

    def submit(self, save: Callable[[], object]) -> None:
        """Start `save`, after waiting for the one before it; a failure of that one is kept for `failures`."""
        self.wait()
        self._idle.clear()
        self._saves.put(save)

    def wait(self) -> None:
        """Return when no save is in flight."""
        self._idle.wait()

    def close(self) -> None:
        """Return when no save is in flight, and end the thread; nothing may be submitted after."""
        self.wait()
        self._saves.put(None)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return not self._idle.is_set()

    def failures(self) -> list[BaseException]:
        """Return the errors of saves that failed since the last call, oldest first."""
        return [self._failures.popleft() for _ in range(len(self._failures))]
