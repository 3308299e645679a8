"""Processes that upload and are killed, forked from one that has imported everything once.

Reads from stdin, for each process: a line of JSON {"url", "checkpoint", "extras", "uploader"}; answers with its process
number, waits for a line, lets it work, and answers with how it ended (waitpid's status).
"""

from __future__ import annotations

import json
import os
import sys
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


def main() -> None:
    import huggingface_hub.constants
    import s3fs  # noqa: F401

    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            sys.stdin.readline()
            work(json.loads(line))
            return
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
