"""The process that the suite's short campaigns run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def short_campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Rows]]:
    """Yield a function that has `warm.py` do a task, and returns its rows."""
    log = tmp_path_factory.mktemp("warm") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("warm.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
    assert process.stdin and process.stdout

    def ask(**task: Any) -> Rows:
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"it ended: {log.read_text()[-3000:]}"
        return json.loads(answer)

    yield ask
    process.stdin.close()
    process.wait(60)
