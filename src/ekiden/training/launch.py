"""`--devices N`: the ranks of this machine, started by torchrun in a process of its own.

A notebook has perhaps used CUDA already, and a process that has cannot become several; so the parent only waits, passes
signals on to the ranks, and reads `RUN/result.json`. Everything that the ranks need is in the settings, which go over as a
recipe file. Run as a module (`python -m ekiden.training.launch ...`), this file is torchrun without its tracebacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import psutil
import torch

from ekiden.config import TrainConfig, to_yaml
from ekiden.errors import UserError
from ekiden.training.interruption import BEGAN, SIGNALS, process_age
from ekiden.training.ranks import PeerLost
from ekiden.training.rundir import TrainResult

SHUTDOWN_SECONDS = 120
"""That the other ranks have to end, and to save, once one of them has failed or the parent is gone."""


def launch(config: TrainConfig) -> TrainResult:
    """Train with `config.devices` processes; return when all have ended.

    Raises:
        UserError: there are not so many GPUs, or the run failed.
    """
    seen = torch.cuda.device_count() if config.device != "cpu" else 0
    if 0 < seen < config.devices or (config.device != "cpu" and config.device != "auto" and not seen):
        raise UserError(f"--devices {config.devices} asks for more GPUs than the {seen} there are; lower it")
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="ekiden-launch-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(to_yaml(dataclasses.replace(config, devices=1)), encoding="utf-8")
        status = _run(config, recipe)
    path = Path(config.output_dir) / "result.json"
    try:
        result = TrainResult(**json.loads(path.read_text())) if path.stat().st_mtime >= began - 1 else None
    except (OSError, ValueError, TypeError):
        result = None
    if status == 0 and result is not None:
        return result
    reason = (
        result.reason
        if result is not None and result.status == "failed"
        else "the ranks were ended from outside"
    )
    raise PeerLost(f"{reason} (status {status})", 0, quiet=result is not None)


def _run(config: TrainConfig, recipe: Path) -> int:
    command = [sys.executable, "-m", "ekiden.training.launch", "--standalone"]
    command += [f"--nproc-per-node={config.devices}", f"--max-restarts={config.max_restarts}"]
    command += ["--module", "ekiden", "train", str(recipe)]
    environment = {**os.environ, BEGAN: str(time.clock_gettime(time.CLOCK_BOOTTIME) - process_age())}
    # In a session of its own: Ctrl-C reaches the parent alone, which passes it on once.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=None if _shows_descriptor_2() else subprocess.PIPE,
        start_new_session=True,
    )
    copier = threading.Thread(target=_copy, args=(process.stderr,), daemon=True) if process.stderr else None
    if copier:
        copier.start()
    with _passed_on(process):
        status = process.wait()
    if copier:
        copier.join()
    return status


def _shows_descriptor_2() -> bool:
    """Return whether what a child writes to its stderr is seen by the user: not in a notebook."""
    try:
        return sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):
        return False


def _copy(source: IO[bytes]) -> None:
    for line in source:
        sys.stderr.write(line.decode(errors="replace"))


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass a first signal on to the ranks, which agree on it; at a second, end them all at once."""
    seen: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        with contextlib.suppress(psutil.Error):
            for rank in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.Error):
                    rank.send_signal(number if len(seen) == 1 else signal.SIGKILL)

    try:
        before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    except ValueError:  # not in the main thread: a notebook's interrupt then comes as KeyboardInterrupt
        before = {}
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent(parent: int) -> None:
    """Stop the ranks, which save, when the process that waits for them has been killed: they hold the run's lock."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Be torchrun, and end with its status and no traceback: the rank that failed has said why."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = parse_args(sys.argv[1:])
    if hasattr(arguments, "shutdown_timeout"):  # torch 2.10 and 2.11 have none, and leave 30 s
        arguments.shutdown_timeout = SHUTDOWN_SECONDS
    try:
        run(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        dead = [
            f"rank {rank} by {signal.Signals(-code).name}"
            for rank, code in codes.items()
            if code == -signal.SIGKILL
        ]
        if dead:
            sys.stderr.write(f"ended from outside: {', '.join(dead)}\n")
        sys.exit(1)
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))


if __name__ == "__main__":
    main()
