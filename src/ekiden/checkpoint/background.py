"""Work beside training: one thread, at most one piece of work in flight, no failure lost.

The loop hands over the work of writing a snapshot that it has already copied, and asks at the next step what
became of it; the report is written this way too. The thread does not keep the process alive: a save that must be
durable before the end is waited for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue


class BackgroundWorker:
    """Does one piece of work at a time in a thread of its own; to be used from one thread.

    The thread is started here and not at each piece: where memory is short, Python's `Thread.start` waits for ever for
    a thread that could not begin (found by the memory sweep of the fault campaign).

    Args:
        name: of the thread, as debuggers show it.
    """

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._failures: deque[BaseException] = deque()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except BaseException as error:  # whatever it was, the loop has to hear of it
                self._failures.append(error)
            finally:
                del work  # and with it the copy of the state
                self._idle.set()

    def submit(self, work: Callable[[], object]) -> None:
        """Begin `work`, after waiting for what is in flight; a failure of that is kept for `failures`."""
        self.wait()
        self._idle.clear()
        self._queue.put(work)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, at most `timeout` seconds, until nothing is in flight; return whether nothing is."""
        return self._idle.wait(timeout)

    def close(self) -> None:
        """End the thread after what is in flight, which is not waited for; nothing may be submitted after."""
        self._queue.put(None)

    @property
    def busy(self) -> bool:
        """Whether work is in flight."""
        return not self._idle.is_set()

    def failures(self) -> list[BaseException]:
        """Return the errors of work that failed since the last call, oldest first."""
        return [self._failures.popleft() for _ in range(len(self._failures))]
