"""Runs with a mirror: the same command on an empty machine, a foreign mirror, one that fails, one that hangs."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import campaign
import pytest

from ekiden.checkpoint.mirror import Mirror, MirrorError, open_mirror
from ekiden.errors import UserError
from ekiden.training.history import read_history
from ekiden.training.loop import train
from ekiden.training.saving import Saving


@pytest.fixture
def mirror(tmp_path: Path) -> str:
    return str(tmp_path / "mirror")


def events(run: Path) -> list[str]:
    return [record["event"] for record in read_history(run / "history.jsonl") if "event" in record]


@pytest.mark.parametrize("preset", ["gemma3-tiny", "gpt2-10m"])
def test_the_same_command_on_an_empty_machine_goes_on(settings, tmp_path, mirror, preset):
    reference = settings(9, preset, output_dir=tmp_path / "reference")
    train(reference)
    run = tmp_path / "run"

    config = settings(9, preset, mirror=mirror, save_steps=2)
    stopped = train_and_stop(config, run, 5)
    assert (stopped.status, stopped.checkpoint) == ("paused", "step-00000005")
    assert open_mirror(mirror).newest().step == 5
    shutil.rmtree(run)
    assert train(config).status == "completed"
    assert campaign.outcome(run) == campaign.outcome(Path(reference.output_dir))
    state = open_mirror(mirror).newest()
    assert state.step == 9 and set(state.extras) == {"history.jsonl", "config.yaml", "result.json"}
    # A run that is done stays done on the next machine, too.
    shutil.rmtree(run)
    train(config)
    assert json.loads((run / "result.json").read_text())["status"] == "completed"


def train_and_stop(config, run: Path, step: int):
    """Train until `step` is done, then stop as by the file `RUN/stop`."""
    from ekiden.training import loop

    before = loop.Trainer._due

    def due(self):
        if self.counters.step == step:
            (run / "stop").touch()
        return before(self)

    loop.Trainer._due = due
    try:
        return train(config)
    finally:
        loop.Trainer._due = before


def test_what_is_newer_wins_and_a_damaged_disk_is_helped_by_the_mirror(settings, tmp_path, mirror, capsys):
    run = tmp_path / "run"
    config = settings(6, mirror=mirror, save_steps=3, max_checkpoints=2)
    train(config)
    for path in (run / "checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    train(config)
    said = capsys.readouterr().err
    assert "step-00000006 is damaged and was passed over" in said
    assert "fetching step 6" in said and "there is no checkpoint in" in said
    assert json.loads((run / "result.json").read_text())["status"] == "completed"
    # Where both are good and of one step, nothing is fetched.
    train(config)
    assert "fetching" not in capsys.readouterr().err


def test_a_mirror_of_another_run_is_refused_and_left_alone(settings, tmp_path, mirror):
    train(settings(3, output_dir=tmp_path / "one", mirror=mirror))
    other = settings(3, output_dir=tmp_path / "two", save_steps=1)
    train(other)
    with pytest.raises(UserError, match=r"holds step 3 of another run .its run is .*give another --mirror"):
        train(settings(4, output_dir=tmp_path / "two", mirror=mirror))
    assert open_mirror(mirror).newest().step == 3
    with pytest.raises(
        UserError, match=r"--seed 1 differs .* or another --output-dir and --mirror for a new run"
    ):
        train(settings(3, output_dir=tmp_path / "three", mirror=mirror, seed=1))


def test_a_mirror_that_fails_stops_nothing_and_is_told(settings, tmp_path, mirror, monkeypatch, capsys):
    def refuse(self, *_arguments):
        raise MirrorError(f"mirror {self.url} could not be written: the network is down", lasting=True)

    monkeypatch.setattr(Mirror, "upload", refuse)
    assert train(settings(6, mirror=mirror, save_steps=2)).status == "completed"
    assert events(tmp_path / "run").count("mirror-failed") >= 2
    assert (
        "the network is down; training goes on, the next checkpoint is tried again" in capsys.readouterr().err
    )
    # Tried again by the next session, which has nothing to train.
    monkeypatch.undo()
    train(settings(6, mirror=mirror, save_steps=2))
    assert open_mirror(mirror).newest().step == 6


def test_a_mirror_that_hangs_holds_up_no_step_and_no_end_once_told(
    settings, tmp_path, mirror, monkeypatch, capsys
):
    hangs = threading.Event()
    monkeypatch.setattr(Mirror, "upload", lambda *_arguments: hangs.wait())
    monkeypatch.setattr("ekiden.training.saving._SECONDS_BEFORE_WORDS", 0.1)
    told = []

    def tell(saving: Saving, give_up) -> None:
        (tmp_path / "run/stop").touch()
        told.append(json.loads((tmp_path / "run/result.json").read_text()))
        close(saving, give_up)

    close = Saving.close
    monkeypatch.setattr(Saving, "close", tell)
    assert train(settings(6, mirror=mirror, save_steps=2)).status == "completed"
    hangs.set()
    assert told[0]["status"] == "completed"
    assert "the mirror keeps the step that it had" in capsys.readouterr().err


def test_best_is_written_again_on_a_machine_that_has_none(settings, tmp_path, mirror):
    run = tmp_path / "run"
    train_and_stop(settings(30, mirror=mirror, eval_steps=2), run, 5)
    assert (run / "best").is_dir()
    shutil.rmtree(run)
    train_and_stop(settings(30, mirror=mirror, eval_steps=2), run, 7)
    assert (run / "best/model.safetensors").is_file()
