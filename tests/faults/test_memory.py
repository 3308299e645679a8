"""A short part of the memory sweep: a limit that leaves room for some samples, and one for nearly none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys, tempfile
from pathlib import Path
from campaign import make_shards
from memory import sweep
with tempfile.TemporaryDirectory() as name:
    shards = make_shards(Path(name))
    print(json.dumps([sweep(shards, Path(name), [20], False), sweep(shards, Path(name), [20], True)]))
"""


def test_a_limited_run_finishes_or_says_what_to_lower() -> None:
    """In a process of its own: it forks, and this one has threads."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(done.stdout.splitlines()[-1]):
        assert row["tries"] == row["resumed"] == row["bit_identical"], row
        assert 1 <= row["found"]["20"] < 64, row
