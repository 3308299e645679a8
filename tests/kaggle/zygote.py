"""`ekiden` commands forked from one process that has imported everything: an import of torch costs 8 s a leg.

A client (`zygote_client.py`) hands over its arguments, environment, folder, stdout and stderr, then signals as single
bytes; it gets the exit status. A client that vanishes takes its command with it, as a killed session does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable


def begin(path: str) -> Callable[[str], None]:
    """Listen at `path`; return what, told to "serve", answers clients until it is killed."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return lambda word: serve(server) if word == "serve" else None


def serve(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            handle(connection)
            os._exit(0)
        connection.close()


def handle(connection: socket.socket) -> None:
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    task = json.loads(message)
    worker = os.fork()
    if worker == 0:
        os.setsid()
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
        os.environ.clear()
        os.environ.update(task["environment"])
        os.chdir(task["folder"])
        work(task["arguments"])
    for descriptor in descriptors:
        os.close(descriptor)
    while True:
        done, status = os.waitpid(worker, os.WNOHANG)
        if done:
            connection.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            return
        if select.select([connection], [], [], 0.02)[0]:
            byte = connection.recv(1)
            os.kill(worker, byte[0] if byte else signal.SIGKILL)
            if not byte:
                return


def work(arguments: list[str]) -> None:
    """Run one command in this process and end it."""
    from ekiden.cli import main
    from ekiden.training import step

    after = int(os.environ.get("STOP_AFTER_STEPS", "0"))
    if after:
        begun = 0
        run = arguments[arguments.index("--output-dir") + 1]

        def hook(index: int, phase: str) -> None:
            nonlocal begun
            begun += index == 0 and phase == "forward"
            if begun == after:
                open(f"{run}/stop", "w").close()  # noqa: PTH123

        step.fault_hook = hook
    status = 1
    try:
        main(arguments)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
