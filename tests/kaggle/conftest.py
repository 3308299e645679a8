"""A tiny corpus, packed; a run of it that was never interrupted; and sessions to run legs in."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import campaign
import common
from sessions import Zygote
from stand_in import StandIn

from ekiden.config import build_config, parse_yaml, to_yaml
from ekiden.kaggle.client import Kaggle, KaggleError
from ekiden.kaggle.pack import plan_pack, write_part
from ekiden.kaggle.signin import check_version
from ekiden.training.loop import train

STEPS = 20


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return token shards of two languages."""
    return common.small_shards(tmp_path_factory.mktemp("kaggle-shards"))


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Yield the process that legs are forked from."""
    started = Zygote(tmp_path_factory.mktemp("zygote"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def recipe(shards: Path) -> str:
    """Return a recipe of a run of 20 steps that takes a second."""
    config = campaign.settings(
        "gemma3-tiny", Path(), Path(), STEPS, eval_steps=5, dataset_path="", output_dir=""
    )
    return to_yaml(config)


@pytest.fixture(scope="session")
def packed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the shards as two datasets: folder by reference."""
    folder = tmp_path_factory.mktemp("packed")
    size = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
    chunk = size // 4 + 1
    pack = plan_pack(shards, "tiny-corpus", max_part_bytes=2 * chunk, chunk_bytes=chunk)
    assert pack.parts == 2
    for part in (1, 2):
        write_part(pack, part, folder / str(part))
    return {f"tester/tiny-corpus-{part}": folder / str(part) for part in (1, 2)}


@pytest.fixture(scope="session")
def reference_run(shards: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of one uninterrupted run."""
    run = tmp_path_factory.mktemp("reference") / "run"
    settings = {**parse_yaml(recipe, "recipe"), "dataset_path": str(shards), "output_dir": str(run)}
    train(build_config(**settings))
    return run


@pytest.fixture(scope="session")
def reference(reference_run: Path) -> campaign.Outcome:
    """Return what one uninterrupted run leaves."""
    return campaign.outcome(reference_run)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Yield a stand-in of Kaggle to which the client of this process talks."""
    pytest.importorskip("kagglesdk", reason="needs the package kaggle: pip install 'ekiden[kaggle]'")
    try:
        check_version()  # of the machine that a relay runs on; Kaggle's images have an older one
    except KaggleError as error:
        pytest.skip(str(error))
    server = StandIn(tmp_path / "kaggle", sys.executable, steps_a_leg=0)
    for name, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield server
    server.close()


@pytest.fixture
def kaggle(stand_in: StandIn) -> Kaggle:
    """Return a client that does not wait between tries."""
    return Kaggle(wait=lambda _: None)
