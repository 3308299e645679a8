"""The run directory's limits: how much the checkpoints may take on Kaggle and elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from ekiden.training import rundir
from ekiden.training.rundir import default_checkpoint_budget


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for /kaggle/working, with 3 MB of other files in it."""
    folder = tmp_path / "working"
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "notes.bin").write_bytes(bytes(3_000_000))
    (folder / "run/checkpoints/old.bin").write_bytes(bytes(5_000_000))
    monkeypatch.setattr(rundir, "KAGGLE_OUTPUT", folder)
    return folder


def test_checkpoints_on_kaggle_leave_room_for_the_rest(output, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert default_checkpoint_budget(output / "run/checkpoints") == 18_000_000_000 - 3_000_000


def test_elsewhere_the_disk_decides(output, tmp_path, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert default_checkpoint_budget(output / "run/checkpoints") is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert default_checkpoint_budget(tmp_path / "elsewhere") is None
