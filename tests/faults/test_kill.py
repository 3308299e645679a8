"""A short, seeded part of the kill campaign: both families, some SIGKILLs, bit-identical to the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_killed_runs_end_bit_identical(preset: str) -> None:
    """In a process of its own: it forks, and this one has threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), "--kills", "6", "--preset", preset],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"passed": true' in done.stdout
