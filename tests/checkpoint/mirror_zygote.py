"""Processes that upload and are killed, forked from one that has imported everything once.

For each task {"url", "checkpoint", "extras", "uploader"} a process is made, whose number is the answer; at the next word it
works, and the answer is how it ended (waitpid's status).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ekiden.checkpoint import mirror as mirrors
from ekiden.checkpoint import mirror_backends
from ekiden.checkpoint.mirror_uploader import MirrorUploader
from ekiden.checkpoint.store import Checkpoint


def work(task: dict[str, Any]) -> None:
    """Upload; with "uploader", in the background, left after a tenth of a second."""
    mirrors.RETRY_SECONDS = (0.0, 0.0)
    mirror_backends.S3_ATTEMPTS = 1
    mirror = mirrors.open_mirror(task["url"])
    checkpoint = Checkpoint.open(Path(task["checkpoint"]))
    extras = {name: Path(path) for name, path in task["extras"].items()}
    if not task.get("uploader"):
        mirror.upload(checkpoint, extras)
        return
    uploader = MirrorUploader(mirror, extras, set())
    uploader.submit(checkpoint)
    assert not uploader.wait(0.1)
    uploader.close()


def begin() -> Callable[[dict[str, Any] | None], int]:
    """Return what makes a process for a task, and, given None, lets it work to its end."""
    import huggingface_hub.constants
    import s3fs  # noqa: F401

    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    waiting: list[tuple[int, int]] = []

    def step(task: dict[str, Any] | None) -> int:
        if task is None:
            pid, gate = waiting.pop()
            os.close(gate)
            return os.waitpid(pid, 0)[1]
        behind, gate = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate)
            os.read(behind, 1)  # nothing comes, but its end
            status = 1
            try:
                work(task)
                status = 0
            finally:
                os._exit(status)
        os.close(behind)
        waiting.append((pid, gate))
        return pid

    return step
