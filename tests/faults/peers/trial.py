"""One process of a training command, forked from one that has imported everything, and what it told before its end.

A command is a function `train(session)`: it resumes where its own rules find something to resume, then trains and saves
for ever. It tells the session what it does; the session passes that on through a pipe, which outlives a SIGKILL, so
that what was acknowledged is known outside the attacked folder.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

TIMEOUT_SECONDS = 120.0
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)


def digest(parameters: Iterable[tuple[str, torch.Tensor]], optimizer: torch.optim.Optimizer) -> str:
    """Return a hash of every weight and every optimizer moment, by name."""
    hashed = xxhash.xxh3_128()
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        state = optimizer.state.get(parameter, {})
        for key, tensor in [("weight", parameter), *sorted(state.items())]:
            hashed.update(f"{name} {key} ".encode())
            hashed.update(torch.as_tensor(tensor).detach().contiguous().numpy().data)
    return hashed.hexdigest()


@dataclass
class Session:
    """What a training command works on, and whom it tells.

    Attributes:
        run: the folder that it may write to. last_step: the process ends when this step was saved.
        resume_only: it ends when the newest state was taken up. shards: token shards, for Ekiden.
        at_step: called before each save, with its number in this process.
        patience: it ends with status 3 after so many saves that failed in a row. every: steps from save to save.
    """

    run: Path
    shards: Path
    last_step: int = 10**9
    resume_only: bool = False
    at_step: Callable[[int], None] | None = None
    patience: int = 10**9
    every: int = 1
    descriptor: int = 1
    saves_begun: int = 0
    saved_last: int = 0

    def tell(self, event: str, step: int, **facts: Any) -> None:
        """Write one line into the pipe (shorter than PIPE_BUF: never torn)."""
        os.write(self.descriptor, (json.dumps({"event": event, "step": step} | facts) + "\n").encode())

    def resumed(self, step: int, state: str) -> None:
        """To be called when the state to train on is ready: step 0 is a fresh start."""
        self.tell("resumed", step, digest=state)
        if self.resume_only:
            os._exit(0)

    def stepped(self, step: int, state: str) -> None:
        """To be called before the save of `step`; not at steps without one."""
        self.saves_begun += 1
        if self.at_step is not None:
            self.at_step(self.saves_begun)
        self.tell("stepped", step, digest=state)
        if self.saves_begun - self.saved_last > self.patience:
            os._exit(3)

    def saved(self, step: int) -> None:
        """To be called when the save of `step` has returned."""
        self.saved_last = self.saves_begun
        self.tell("saved", step)
        if step >= self.last_step:
            os._exit(0)


@dataclass
class Trial:
    """What became of one process.

    Attributes:
        status: exit status, None where it was killed. problem: the last line of an error. seconds: from its start.
    """

    status: int | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the events of one kind."""
        return [found for found in self.events if found["event"] == event]

    @property
    def resumed(self) -> dict[str, Any] | None:
        """Return where it went on, or None where it did not get so far."""
        found = self.of("resumed")
        return found[0] if found else None

    @property
    def in_save(self) -> bool:
        """Whether it ended between the end of a step and the end of its save."""
        last = {event["event"]: event["step"] for event in self.events}
        return last.get("stepped", 0) > last.get("saved", 0)


def run_trial(
    train: Callable[[Session], None],
    session: Session,
    log: Path,
    kill_after: float | None = None,
    environment: dict[str, str] | None = None,
) -> Trial:
    """Run `train` in a forked process.

    Args:
        kill_after: SIGKILL so many seconds after it has taken up its state; None: only after the time limit.
        environment: variables of that process.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(train, session, writer, log, environment or {})
    os.close(writer)
    trial = Trial()
    began = time.monotonic()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    pending, waiting = b"", kill_after is not None
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + TIMEOUT_SECONDS
            continue
        data = os.read(reader, 65536)
        if not data:
            break
        *lines, pending = (pending + data).split(b"\n")
        trial.events += [json.loads(line) for line in lines]
        if waiting and trial.resumed:
            waiting, deadline = False, time.monotonic() + (kill_after or 0.0)
    os.close(reader)
    trial.seconds = time.monotonic() - began
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    trial.status = None if code in KILLED else code
    if trial.status:
        lines_of_log = log.read_text(errors="replace").strip().splitlines()
        trial.problem = lines_of_log[-1][:200] if lines_of_log else ""
    return trial


def _work(
    train: Callable[[Session], None], session: Session, writer: int, log: Path, environment: dict[str, str]
) -> None:
    """Be the process; never return."""
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(environment)
        session.descriptor = writer
        train(session)
        status = 0
    except BaseException as error:
        text = " ".join(str(error).split())
        os.write(2, f"\n{type(error).__name__}: {text}\n".encode(errors="replace"))
    finally:
        os._exit(status)
