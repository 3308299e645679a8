"""A tiny corpus as shards, and settings of runs that take a second."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ekiden.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import campaign


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return token shards of two languages, 500 pieces."""
    return campaign.make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def settings(shards: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Return a maker of settings: `settings(steps, preset=..., **more)`, in `tmp_path/run`."""

    def make(steps: int = 6, preset: str = "gemma3-tiny", **more: Any) -> TrainConfig:
        options = {"output_dir": str(tmp_path / "run"), **more}
        run = Path(options.pop("output_dir"))
        return campaign.settings(preset, options.pop("dataset_path", shards), run, steps, **options)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of its own, which can be made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)
