"""`ekiden` commands in processes of little memory, forked from one that has imported what they need and no torch.

A start of Python costs 0.4 s of CPU; a fork of so small a process 5 ms.
"""

from __future__ import annotations

import os
import resource
import traceback
from collections.abc import Callable
from pathlib import Path

MEGABYTE = 1 << 20


def begin(folder: Path) -> Callable[[tuple[list[str], int]], tuple[int, str, str]]:
    """Return what runs a command, given its arguments and the megabytes of address space that it may have in all.

    The answer is its exit status and what it wrote to stdout and stderr.
    """
    import ekiden.checkpoint.convert  # noqa: F401
    from ekiden.cli import main

    def run(task: tuple[list[str], int]) -> tuple[int, str, str]:
        arguments, megabytes = task
        written = [folder / "stdout", folder / "stderr"]
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for number, path in enumerate(written, 1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                resource.setrlimit(resource.RLIMIT_AS, (megabytes * MEGABYTE, megabytes * MEGABYTE))
                main(arguments)
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, written[0].read_text(), written[1].read_text()

    return run
