"""What happens at the edges, each with its one sentence: signals amid a save, a stopped process, a clock that jumps,
a read-only disk, two trainers, data that changed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import Outcome, outcome
from forked import Command

from ekiden.checkpoint import files
from ekiden.config import TrainConfig, to_yaml
from ekiden.errors import UserError
from ekiden.training import step as step_module
from ekiden.training.history import read_history
from ekiden.training.loop import train

Settings = Callable[..., TrainConfig]


@pytest.fixture
def reference(settings: Settings, tmp_path: Path) -> Outcome:
    """Return what an uninterrupted run of 9 steps leaves."""
    train(settings(9, output_dir=tmp_path / "reference"))
    return outcome(tmp_path / "reference")


def start(config: TrainConfig, folder: Path) -> Command:
    """Start `ekiden train` as a user does."""
    number = len(list(folder.glob("recipe-*")))
    recipe = folder / f"recipe-{number}.yaml"
    recipe.write_text(to_yaml(config))
    return Command(["train", str(recipe)], folder / f"log-{number}")


@pytest.mark.parametrize("operation", ["create", "write", "fsync", "rename", "sync"])
def test_sigterm_amid_a_save_ends_with_that_save(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Outcome, operation: str
) -> None:
    sent = False

    def terminate(now: str, path: Path) -> None:
        nonlocal sent
        if not sent and now == operation and "step-00000003" in str(path):
            sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(files, "fault_hook", terminate)
    if operation == "sync":  # that of the folder of checkpoints: its path names no step
        monkeypatch.setattr(files, "fault_hook", lambda now, path: terminate(now, path / "step-00000003"))
    paused = train(settings(9))
    assert sent and paused.status == "paused" and paused.reason == "SIGTERM"
    monkeypatch.setattr(files, "fault_hook", None)
    assert (tmp_path / "run" / "checkpoints" / str(paused.checkpoint)).is_dir()
    train(settings(9))
    assert outcome(tmp_path / "run") == reference


def test_a_stopped_process_goes_on(settings: Settings, tmp_path: Path, reference: Outcome) -> None:
    process = start(settings(9), tmp_path)
    history = tmp_path / "run" / "history.jsonl"
    while not history.exists():
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(5):
        if process.poll() is None:
            process.send(signal.SIGSTOP)
            time.sleep(0.1)
            process.send(signal.SIGCONT)
            time.sleep(0.02)
    assert process.wait() == 0, process.log.read_text()
    assert outcome(tmp_path / "run") == reference


def test_a_clock_that_jumps_back_changes_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Outcome
) -> None:
    now, year = time.time(), 365 * 86_400
    monkeypatch.setattr(time, "time", lambda: now - year * (1 if random.random() < 0.5 else 3))

    def stop(index: int, phase: str) -> None:
        calls.append(index)
        if len(calls) == 2 * 7:
            raise KeyboardInterrupt

    calls: list[int] = []
    monkeypatch.setattr(step_module, "fault_hook", lambda i, p: stop(i, p) if i >= 0 else None)
    with pytest.raises(KeyboardInterrupt):
        train(settings(9))
    monkeypatch.setattr(step_module, "fault_hook", None)
    # Modification times are no help either: the older checkpoint is dated in the future.
    for order, path in enumerate(sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)):
        os.utime(path, (now + order * year, now + order * year))
    train(settings(9))
    resumed = [e for e in read_history(tmp_path / "run" / "history.jsonl") if e.get("event") == "resume"]
    assert resumed[0]["step"] == 6
    assert outcome(tmp_path / "run") == reference


def remount(folder: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", folder], check=True)


def test_a_read_only_run_directory_is_refused(settings: Settings, small_disk: Path) -> None:
    remount(small_disk, "ro")
    with pytest.raises(UserError, match=r"cannot be written .*give a folder on a writable disk"):
        train(settings(9, output_dir=small_disk / "run"))


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], None]]) -> None:
    """Run each action before the first microbatch of its step (one microbatch a step)."""
    begun = 0

    def hook(index: int, phase: str) -> None:
        nonlocal begun
        if index == 0 and phase == "forward":
            begun += 1
            actions.get(begun, lambda: None)()

    monkeypatch.setattr(step_module, "fault_hook", hook)


def test_a_full_disk_is_lived_through_and_freed_again(
    settings: Settings,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reference: Outcome,
) -> None:
    filler, run = small_disk / "filler", small_disk / "run"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    at_step(monkeypatch, {5: fill, 8: filler.unlink})
    assert train(settings(9, output_dir=run, background_save=False)).status == "completed"
    said = capsys.readouterr().err
    assert "training goes on, older checkpoints stay" in said
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-00000003", "step-00000009"]
    assert outcome(run) == reference  # the history too: every step is in it


def test_a_disk_that_turns_read_only_costs_later_checkpoints_only(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(operation: str, path: Path) -> None:
        if operation not in ("open", "read"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    at_step(monkeypatch, {5: lambda: monkeypatch.setattr(files, "fault_hook", read_only)})
    result = train(settings(9, background_save=False))
    assert (result.status, result.reason) == ("paused", "final_model/ could not be written")
    said = capsys.readouterr().err
    assert (
        "all 9 steps are done, but final_model/ could not be written; make room and run the same command again"
        in said
    )
    assert "(step 6: the file system is read-only); training goes on, older checkpoints stay" in said
    assert "result.json could not be written (the file system is read-only)" in said
    monkeypatch.setattr(files, "fault_hook", None)
    monkeypatch.setattr(step_module, "fault_hook", None)
    result = train(settings(9))
    assert (result.status, result.checkpoint) == ("completed", "step-00000009")
    assert f"the model is in {tmp_path / 'run' / 'final_model'}" in capsys.readouterr().err


def test_two_trainers_on_one_run_directory(settings: Settings, tmp_path: Path) -> None:
    first = start(settings(5000, save_steps=5), tmp_path)
    holder = tmp_path / "run" / ".lock-holder"
    while not holder.exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = start(settings(5000), tmp_path)
    assert second.wait() == 1
    said = second.log.read_text()
    assert f"is in use by process {first.pid}" in said and "Traceback" not in said
    first.kill()
    steps = [int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert train(settings(max(steps, default=0) + 2)).status == "completed"


def test_a_changed_tokenizer_is_refused(settings: Settings, shards: Path, tmp_path: Path) -> None:
    train(settings(3))
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    description = json.loads((other / "dataset.json").read_text())
    model = next((other / "tokenizer").glob("*.model"))
    model.write_bytes(model.read_bytes() + b"\x1a\x00")
    with pytest.raises(UserError, match="tokenizer"):
        train(settings(6, dataset_path=other))
    assert description["tokenizer_sha256"]


def test_a_changed_shard_is_refused(settings: Settings, shards: Path, tmp_path: Path) -> None:
    train(settings(3))
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    shard = other / "english" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00000\.bin"):
        train(settings(6, dataset_path=other))


def test_the_history_is_durable_before_the_checkpoint_it_leads_to(settings, tmp_path, monkeypatch):
    operations = []

    def listen(operation: str, path: Path) -> None:
        if (operation == "fsync" and path.name == "history.jsonl") or (
            operation == "rename" and path.name.startswith(".tmp-step")
        ):
            operations.append(path.name)

    monkeypatch.setattr(files, "fault_hook", listen)
    train(settings(4, save_steps=2))
    assert operations == ["history.jsonl", ".tmp-step-00000002-0", "history.jsonl", ".tmp-step-00000004-0"]
