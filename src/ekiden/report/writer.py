"""The report beside training: written in a thread, rarely, and never a reason for a run to stop.

The loop asks after each evaluation; a report is written where the last one took less than a hundredth of the time
since then. At the end of a session it is written whatever it takes, within a limit.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ekiden.progress import say
from ekiden.report.page import compressed_plotly, write_page
from ekiden.report.picture import write_picture
from ekiden.report.reading import RunReader

SHARE = 0.01
"""Of the time, that reports may take."""
FINISH_SECONDS = 20.0
"""What the last report of a session may take; a spot machine gives 30 seconds and more."""


class ReportWriter:
    """Keeps `RUN/report.html` and, at the end, `RUN/loss.png`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._reader: RunReader | None = None
        self._thread: threading.Thread | None = None
        self._seconds, self._written = 0.0, -float("inf")
        self._failed = False

    def request(self) -> bool:
        """Write a report in the background, unless the last one was too recent; return whether it began."""
        busy = self._thread is not None and self._thread.is_alive()
        if busy or self._failed or self._seconds > SHARE * (time.monotonic() - self._written):
            return False
        self._begin(last=False)
        return True

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """Write the session's last report; give up after `seconds`."""
        deadline = time.monotonic() + seconds
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                say(
                    f"report.html was not ready after {seconds:.0f} seconds; `ekiden report {self.run}` writes it"
                )
                return
        if self._failed:
            return
        self._begin(last=True)
        assert self._thread is not None
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            say(
                f"report.html was not ready after {seconds:.0f} seconds; `ekiden report {self.run}` writes it"
            )

    def _begin(self, last: bool) -> None:
        self._thread = threading.Thread(target=self._write, args=(last,), name="report", daemon=True)
        self._thread.start()

    def _write(self, last: bool) -> None:
        began = time.monotonic()
        try:
            compressed_plotly()
            if self._reader is None:
                self._reader = RunReader(self.run)
            self._reader.update()
            data = self._reader.data()
            write_page(data, self.run / "report.html")
            if last:
                write_picture(data, self.run / "loss.png")
        except Exception as error:  # a report never stops training
            self._failed = True
            say(
                f"report.html could not be written ({' '.join(str(error).split())}); training goes on without it"
            )
        self._written = time.monotonic()
        self._seconds = self._written - began
