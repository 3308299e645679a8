"""The comparison's drivers find what they are to find: a torn `torch.save`, and nothing where Ekiden saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from common import work_folder

COMPARE = Path(__file__).with_name("peers") / "compare.py"
CLEAN = ("needed_human", "silently_older", "steps_lost", "wrong")


@pytest.mark.slow
def test_a_torn_save_is_seen_and_ekiden_has_none() -> None:
    """In a process of its own: it forks, and this one has threads."""
    options = [
        "--only",
        "torch-save,ekiden",
        "--faults",
        "kill,kill-in-write",
        "--kills",
        "3",
        "--save-every",
        "1",
        "--tenths",
        "1,9",
        *(["--work", work] if (work := work_folder()) else []),
    ]
    done = subprocess.run(
        [sys.executable, str(COMPARE), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tables = json.loads(done.stdout.splitlines()[-1])["comparison"]
    rows = {(fault, row["system"]): row for fault, found in tables.items() for row in found}
    # Ended by the kernel amid a write over the only file, every time: nothing else is there to go on from.
    torn = rows["kill-in-write", "torch-save"]
    assert torn["needed_human"] == torn["kills"] == 2
    assert torn["steps_lost"] > 0
    for fault, kills in (("kill", 3), ("kill-in-write", 2)):
        row = rows[fault, "ekiden"]
        assert row["kills"] == kills
        assert [row[name] for name in CLEAN] == [0, 0, 0, 0], row
        assert row["repeated"] == row["identical"] if fault == "kill" else True
