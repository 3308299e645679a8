"""Processes forked from one that has imported everything: an import of torch costs 6 s of CPU, a fork nothing.

What a test started as a program of its own only to kill, stop or signal it goes through here instead.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Child:
    """A process on its way; `log` takes what it writes to stdout and stderr, after what is there."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.pid = self.start()

    def start(self) -> int:
        """Start it; return its process id."""
        raise NotImplementedError

    def poll(self) -> int | None:
        """Return how it ended, -N for signal N; None: it goes on."""
        raise NotImplementedError

    def wait(self, seconds: float = 120) -> int:
        """Return how it ended, which must be within so many seconds."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it did not end: {self.log.read_text()[-3000:]}")
            time.sleep(0.002)
        return status

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send(signal.SIGKILL)
        self.wait()


class Forked(Child):
    """A fork of this process, which may have no threads, nor have had backward passes in any (autograd refuses).

    It does `work` and ends with its status: 0, that of a SystemExit, or 1 with the error said.
    """

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.work = work
        self._status: int | None = None
        super().__init__(log)

    def start(self) -> int:
        """Fork."""
        pid = os.fork()
        if pid == 0:
            become(self.work, self.log)
        return pid

    def poll(self) -> int | None:
        """Return how it ended, -N for signal N; None: it goes on."""
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if done else None
        return self._status


def become(work: Callable[[], object], log: Path) -> None:
    """Do `work` with this process's output in `log`, and end the process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Under pytest they are not 1 and 2.
    sys.stdout, sys.stderr = (io.TextIOWrapper(open(n, "wb", 0), write_through=True) for n in (1, 2))  # noqa: PTH123, SIM115
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException as error:
        os.write(2, f"\n{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


class Command(Child):
    """`ekiden ARGUMENTS` as a user starts it, forked from a server that has imported everything and done nothing else.

    Not from pytest's own process, where other tests have trained.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ekiden.training.loop", "ekiden.cli.training"])
        self._process = context.Process(target=_run, args=(arguments, log), daemon=True)
        super().__init__(log)

    def start(self) -> int:
        """Ask the server for a fork."""
        self._process.start()
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return how it ended, -N for signal N; None: it goes on."""
        return self._process.exitcode


def _run(arguments: list[str], log: Path) -> None:
    from ekiden.cli import main

    become(lambda: main(arguments), log)
