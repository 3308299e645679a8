"""Processes forked from one that has imported everything: an import of torch costs 6 s of CPU, a fork nothing.

What a test started as a program of its own only to kill, stop or signal it goes through here instead. `Forked` is for
drivers that have no threads; pytest's own process has, and has trained: `Command` and `Served` are forked from a server of
pytest's process, one for all tests, that has done nothing but import.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal

IMPORTED = [
    "ekiden.training.loop",
    "ekiden.cli.training",
    "ekiden.evaluation.loss",
    "ekiden.export.huggingface",
]


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
    write_to(log)
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


def write_to(log: Path) -> None:
    """Let this process's output go to the end of `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Under pytest they are not 1 and 2.
    raw = [open(n, "wb", 0, closefd=False) for n in (1, 2)]  # noqa: SIM115
    sys.stdout, sys.stderr = (io.TextIOWrapper(file, write_through=True) for file in raw)


def server() -> ForkServerContext:
    """Return what starts processes by forking the server; the first of them starts it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class Command(Child):
    """`ekiden ARGUMENTS` as a user starts it."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._process = server().Process(target=_run, args=(arguments, log, dict(os.environ)), daemon=True)
        super().__init__(log)

    def start(self) -> int:
        """Ask the server for a fork."""
        self._process.start()
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return how it ended, -N for signal N; None: it goes on."""
        return self._process.exitcode


def _run(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    from ekiden.cli import main

    _take(environment)
    become(lambda: main(arguments), log)


def _take(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class Served:
    """A process that does tasks one after the other, and may itself fork.

    Args:
        begin: of a module, called there with `arguments`; it returns what a task is given to, and whose result is the
            answer.
        method: "spawn" for one that must not have imported torch.
    """

    def __init__(
        self,
        begin: Callable[..., Callable[[Any], Any]],
        log: Path,
        *arguments: Any,
        method: Literal["forkserver", "spawn"] = "forkserver",
    ) -> None:
        self.log = log
        context = server() if method == "forkserver" else multiprocessing.get_context(method)
        self._pipe, theirs = context.Pipe()
        task = (begin, theirs, log, dict(os.environ), arguments)
        self._process = context.Process(target=_serve, args=task, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, task: Any) -> Any:
        """Return the answer to a task."""
        self.give(task)
        return self.take()

    def give(self, task: Any) -> None:
        """Hand over a task, or what a task under way waits for."""
        self._pipe.send(task)

    def take(self) -> Any:
        """Return the answer to what was given."""
        try:
            return self._pipe.recv()
        except EOFError:
            raise AssertionError(f"it ended: {self.log.read_text()[-3000:]}") from None

    def close(self) -> None:
        """End it once it has done its task."""
        self._pipe.close()
        self._process.join(60)
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join()


def _serve(
    begin: Callable[..., Any], pipe: Connection, log: Path, environment: dict[str, str], arguments: Any
) -> None:
    def work() -> None:
        _take(environment)
        answer = begin(*arguments)
        while True:
            try:
                task = pipe.recv()
            except EOFError:
                return
            pipe.send(answer(task))

    become(work, log)
