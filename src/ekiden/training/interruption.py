"""Everything that asks a run to stop or save becomes a flag, read at the step boundary.

Sources: SIGTERM, SIGINT and SIGUSR1 (spot notices, Ctrl-C, Slurm's --signal), the time limit of `--max-time`
counted from the start of the process, and the files `RUN/stop` and `RUN/save`. A handler only sets a flag: nothing
is saved inside a signal handler, where the state may be half a step old. A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIME_LIMIT, STOP_FILE = "time limit", "stop file"
REASONS = (*(number.name for number in SIGNALS), TIME_LIMIT, STOP_FILE)
"""Why a run stops, as ranks tell each other: by its place in here."""
BEGAN = "EKIDEN_BEGAN"
"""Environment: when the command began that started this rank, in seconds since boot."""


class Interruption:
    """The flags of one run.

    Args:
        run_dir: where the files `stop` and `save` are looked for; None: they are not, another rank does.
        max_seconds: time limit of the process; None: none.
    """

    def __init__(self, run_dir: Path | None, max_seconds: float | None = None) -> None:
        self._stop_file = run_dir / "stop" if run_dir is not None else None
        self._save_file = run_dir / "save" if run_dir is not None else None
        self._signal: signal.Signals | None = None
        # Monotonic time of the process's start: imports alone take 5-30 s of a paid session.
        self._deadline = time.monotonic() - command_age() + max_seconds if max_seconds is not None else None

    @contextlib.contextmanager
    def handlers(self) -> Iterator[None]:
        """Install the signal handlers, and put the old ones back at the end."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None:
            os.write(2, b"\nsecond signal: ending at once; the newest checkpoint stays\n")
            os._exit(128 + number)
        self._signal = signal.Signals(number)
        name = self._signal.name.encode()
        os.write(
            sys.stderr.fileno(), b"\n" + name + b": finishing the step, then saving; once more ends at once\n"
        )

    def stop_reason(self, reserve_seconds: float) -> str | None:
        """Return why the run has to stop now, or None.

        Args:
            reserve_seconds: time that stopping takes (a step and a save, measured), kept free before the deadline.
        """
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() + reserve_seconds >= self._deadline:
            return TIME_LIMIT
        if self._stop_file is not None and self._stop_file.exists():
            with contextlib.suppress(OSError):  # on a read-only disk it stays, and stops the next session too
                self._stop_file.unlink(missing_ok=True)
            return STOP_FILE
        return None

    def save_requested(self) -> bool:
        """Return whether `RUN/save` is there, and take it away."""
        if self._save_file is None or not self._save_file.exists():
            return False
        try:
            self._save_file.unlink(missing_ok=True)
        except OSError:
            return False
        return True


def command_age() -> float:
    """Return the seconds since the command began that this process is a rank of: a restarted rank has less time left."""
    if os.environ.get(BEGAN):
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - float(os.environ[BEGAN]))
    return process_age(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)


def process_age(pid: int | None = None) -> float:
    """Return the seconds since this process (or another) began.

    On Linux by the clock that counts from boot: the wall clock of a fresh machine jumps when it is first set.
    """
    try:
        after_name = Path(f"/proc/{pid or 'self'}/stat").read_text().rpartition(")")[2].split()
        # Field 22 of proc(5), the 20th after the name: start time in clock ticks since boot.
        began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, ValueError, IndexError):
        return max(0.0, time.time() - psutil.Process(pid).create_time())
