"""Trackers: every step once over interruptions, in each program's own files; one that fails or hangs stops nothing."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ekiden.config import TrainConfig, build_config
from ekiden.errors import UsageError, UserError
from ekiden.training.history import History, read_history
from ekiden.training.loop import train
from ekiden.training.trackers import Follower, base, follow, wandb_offline

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import campaign

STEPS = 24
Settings = Callable[..., TrainConfig]


class Collected:
    """A tracker that keeps what it is given."""

    def __init__(self, problem: BaseException | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = False
        self.problem = problem

    def has(self, kind: str, step: int) -> bool | None:
        return None

    def send(self, record: dict[str, Any]) -> None:
        if self.problem:
            raise self.problem
        self.records.append(record)

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def follow_all(run: Path, tracker: Collected) -> None:
    follower = Follower("fake", run, lambda run_id: tracker)
    follower.finish()
    assert follower.join(30)


def write_steps(run: Path, first: int, last: int, resumed_at: int = 0) -> None:
    history = History(run / "history.jsonl", resumed_at)
    for step in range(first, last + 1):
        history.add("train", step, loss=1.0 / step)
        if step % 5 == 0:
            history.add("eval", step, languages={"english": {"loss": 2.0}}, macro={}, micro={})
    history.close()


def test_each_step_is_sent_once_over_a_session_whose_end_is_done_again(tmp_path: Path) -> None:
    tracker = Collected()
    write_steps(tmp_path, 1, 8)
    follow_all(tmp_path, tracker)
    write_steps(tmp_path, 5, 12, resumed_at=4)  # steps 5 to 8 once more
    follow_all(tmp_path, tracker)
    assert [r["step"] for r in tracker.records if r["kind"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in tracker.records if r["kind"] == "eval"] == [5, 10]


def test_what_a_failing_tracker_missed_is_sent_by_the_next_session(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    follow_all(tmp_path, Collected(OSError("no route to host")))
    after = Collected()
    follow_all(tmp_path, after)
    assert [r["step"] for r in after.records if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert after.closed


def test_a_follower_keeps_up_with_a_history_that_is_being_written(tmp_path: Path) -> None:
    tracker = Collected()
    history = History(tmp_path / "history.jsonl", 0)
    follower = Follower("fake", tmp_path, lambda run_id: tracker)
    for step in range(1, 200):
        history.add("train", step, loss=0.5)
        follower.wake()
    follower.finish()
    assert follower.join(30)
    assert [r["step"] for r in tracker.records] == list(range(1, 200))
    history.close()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no package be missing and the end be waited for a moment only."""
    monkeypatch.setattr(follow, "require_packages", lambda names: None)
    monkeypatch.setattr(follow.Trackers.close, "__defaults__", (0.3,))
    yield


def test_a_tracker_that_raises_and_one_that_exits_do_not_stop_training(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, fakes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def leaves(*_: Any) -> Any:
        raise SystemExit("log in first")

    monkeypatch.setitem(base.TRACKERS, "wandb", lambda *_: Collected(ConnectionError("gone")))
    monkeypatch.setitem(base.TRACKERS, "trackio", leaves)
    assert train(settings(4, trackers=["wandb,trackio"])).status == "completed"
    said = capsys.readouterr().err
    assert said.count("wandb failed (gone); training goes on without it") == 1
    assert said.count("trackio failed (log in first)") == 1


@pytest.mark.parametrize("where", ["open", "send", "close"])
def test_a_tracker_that_hangs_does_not_stop_training(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    fakes: None,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    forever = threading.Event()

    class Hangs(Collected):
        def __init__(self) -> None:
            super().__init__()
            if where == "open":
                forever.wait()

        def send(self, record: dict[str, Any]) -> None:
            if where == "send":
                forever.wait()

        def close(self) -> None:
            forever.wait()

    monkeypatch.setitem(base.TRACKERS, "tensorboard", lambda *_: Hangs())
    assert train(settings(4, trackers=["tensorboard"])).status == "completed"
    assert "tensorboard did not finish within" in capsys.readouterr().err
    forever.set()


def test_an_unknown_tracker_and_a_missing_package_are_told(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UsageError, match=r"--trackers tensorbord is not one of .*tensorboard"):
        build_config(trackers=["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ekiden\[trackio\]'"):
        base.require_packages(["trackio"])


class AfterTheNotes(campaign.Aim):
    """Ends the process like its parent, once every tracker has noted what the history holds."""

    def __init__(self, kind: str, count: int, run: Path) -> None:
        super().__init__(kind, count)
        self.run = run

    def hook(self, operation: str, path: Path) -> None:
        if self.left == 1 and self.matches(operation, path):
            last = max(r["step"] for r in read_history(self.run / "history.jsonl") if r["kind"] == "train")
            notes = list((self.run / "trackers").glob("*.json"))
            deadline = time.monotonic() + 60
            while (
                any(json.loads(n.read_text())["train"] < last for n in notes) and time.monotonic() < deadline
            ):
                time.sleep(0.05)
        super().hook(operation, path)


def three_sessions(config: TrainConfig, log: Path) -> dict[str, list[int]]:
    """Train in three processes, the first two killed at a rename; return the steps of the history by kind."""
    run = Path(config.output_dir)
    for number in (1, 2):
        ended = campaign.trial(config, log, setup=AfterTheNotes("at a rename", 14, run).take)
        assert ended.status is None, f"session {number} was not killed: {log.read_text()[-2000:]}"
    assert campaign.trial(config, log).status == 0, log.read_text()[-2000:]
    steps: dict[str, list[int]] = {"train": [], "eval": []}
    for record in read_history(run / "history.jsonl"):
        if record["kind"] in steps:
            steps[record["kind"]].append(record["step"])
    assert [r["event"] for r in read_history(run / "history.jsonl") if r.get("event") == "resume"] == [
        "resume"
    ] * 2
    assert steps["train"] == list(range(1, STEPS + 1))
    return steps


def test_wandb_offline_has_one_run_and_each_step_once_over_three_sessions(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = settings(STEPS, use_wandb=True, eval_steps=5, save_steps=2)
    steps = three_sessions(config, tmp_path / "log")
    folder = tmp_path / "run" / "wandb"
    runs = {path.name.rsplit("-", 1)[1] for path in folder.glob("offline-run-*")}
    assert len(runs) == 1 and len(list(folder.glob("offline-run-*"))) == 3
    rows = [
        row
        for path in sorted(folder.glob("offline-run-*/run-*.wandb"))
        for row in wandb_offline.logged_rows(path)
    ]
    assert Counter(r["step"] for r in rows if "train/loss" in r) == Counter(steps["train"])
    assert Counter(r["step"] for r in rows if "eval/macro/loss" in r) == Counter(steps["eval"])
    losses = {
        r["step"]: r["loss"] for r in read_history(tmp_path / "run" / "history.jsonl") if r["kind"] == "train"
    }
    assert {r["step"]: r["train/loss"] for r in rows if "train/loss" in r} == losses


def test_tensorboard_and_trackio_have_each_step_once_over_three_sessions(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("tensorboard")
    pytest.importorskip("trackio")
    config = settings(STEPS, trackers=["tensorboard", "trackio"], eval_steps=5, save_steps=2)
    steps = three_sessions(config, tmp_path / "log")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == steps["train"]
    assert [e.step for e in events.Scalars("eval/macro/loss")] == steps["eval"]
    import sqlite3

    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, cast(metrics as blob) from metrics").fetchall()
    assert len({row[0] for row in rows}) == 1
    assert Counter(step for _, step, m in rows if b"train/loss" in bytes(m)) == Counter(steps["train"])
    assert Counter(step for _, step, m in rows if b"eval/macro/loss" in bytes(m)) == Counter(steps["eval"])


def test_a_session_records_its_hardware_versions_mixture_and_time(settings: Settings) -> None:
    config = settings(6)
    train(config)
    records = list(read_history(Path(config.output_dir) / "history.jsonl"))
    start = next(r for r in records if r.get("event") == "start")
    assert start["hardware"]["cores"] >= 1 and start["versions"]["torch"]
    assert start["model"]["flops_per_token"] > 6 * start["model"]["parameters_in_blocks"]
    assert set(start["mixture"]["languages"]) == {"english", "other"}
    seconds = next(r for r in records if r.get("event") == "stop")["seconds"]
    parts = sum(value for name, value in seconds.items() if name != "total")
    assert {"starting", "training", "evaluation", "samples", "saving"} <= set(seconds)
    assert 0 < parts <= seconds["total"] + 0.01
    assert os.getpid() == start["pid"]
