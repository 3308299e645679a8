"""The report beside training: written in a thread, rarely, and never a reason for a run to stop.

The loop asks after each evaluation; a report is written where the last one took less than a hundredth of the time
since then. At the end of a session it is written whatever it takes, within a limit.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.checkpoint.background import BackgroundWorker
from ekiden.errors import UserError
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
        self._worker = BackgroundWorker("report")
        self._seconds, self._written = 0.0, -float("inf")
        self._failed = False

    def request(self) -> bool:
        """Write a report in the background, unless the last one was too recent; return whether it began."""
        too_soon = self._seconds > SHARE * (time.monotonic() - self._written)
        if self._worker.busy or self._failed or too_soon:
            return False
        self._worker.submit(partial(self._write, last=False))
        return True

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """Write the session's last report, giving up after `seconds`; nothing may be asked for after."""
        deadline = time.monotonic() + seconds
        done = self._worker.wait(seconds)
        if done and not self._failed:
            self._worker.submit(partial(self._write, last=True))
            done = self._worker.wait(max(0.0, deadline - time.monotonic()))
        self._worker.close()
        if not done:
            say(
                f"report.html was not ready after {seconds:.0f} seconds; `ekiden report {self.run}` writes it"
            )

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
                self._write_picture(data)
        except Exception as error:  # a report never stops training
            self._failed = True
            why = files.reason(error) if isinstance(error, OSError) else " ".join(str(error).split())
            say(f"report.html could not be written ({why}); training goes on without it")
        self._written = time.monotonic()
        self._seconds = self._written - began

    def _write_picture(self, data: dict[str, Any]) -> None:
        try:
            write_picture(data, self.run / "loss.png")
        except UserError as error:  # matplotlib is missing; the page stands without it
            say(f"loss.png is left out: {error}")
