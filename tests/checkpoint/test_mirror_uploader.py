"""Uploads beside training: one at a time, the newest next, what is in hand protected, failures told, no long good-bye."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from mirror_runs import MirroredRun

from ekiden.checkpoint.mirror import MirrorError
from ekiden.checkpoint.mirror_uploader import MirrorUploader


class Gate:
    """Stands in for a mirror: every upload says that it began and waits until it is let through, or fails."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.started, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def upload(self, checkpoint: Any, _extras: Any) -> None:
        self.began.append(checkpoint.step)
        self.started.release()
        assert self.open.acquire(timeout=60)
        if self.error is not None:
            raise self.error


@pytest.fixture
def run(tmp_path: Path) -> MirroredRun:
    return MirroredRun(tmp_path, f"memory:/{tmp_path}")


def test_one_upload_at_a_time_and_the_newest_next(run: MirroredRun) -> None:
    gate, protected = Gate(), set[int]()
    uploader = MirrorUploader(gate, run.extras, protected)  # type: ignore[arg-type]
    checkpoints = {step: run.save(step) for step in (1, 2, 3)}
    uploader.submit(checkpoints[1])
    assert gate.started.acquire(timeout=60)
    assert protected == {1}
    for step in (2, 3):
        uploader.submit(checkpoints[step])
        assert protected == {1, step}
    gate.open.release()
    assert gate.started.acquire(timeout=60)
    assert (gate.began, protected, uploader.busy) == ([1, 3], {3}, True)
    gate.open.release()
    assert uploader.wait(60)
    assert (gate.began, protected, uploader.busy) == ([1, 3], set(), False)
    # It can be used again.
    uploader.submit(checkpoints[2])
    gate.open.release()
    assert uploader.wait(60)
    assert gate.began == [1, 3, 2]
    assert uploader.failures() == []


def test_the_same_step_again_stays_protected(run: MirroredRun) -> None:
    gate, protected = Gate(), set[int]()
    uploader = MirrorUploader(gate, run.extras, protected)  # type: ignore[arg-type]
    checkpoint = run.save(1)
    uploader.submit(checkpoint)
    assert gate.started.acquire(timeout=60)
    for _ in range(2):
        uploader.submit(checkpoint)
    gate.open.release()
    assert gate.started.acquire(timeout=60)
    assert protected == {1}
    gate.open.release()
    assert uploader.wait(60)
    assert (gate.began, protected) == ([1, 1], set())


@pytest.mark.parametrize("error", [MirrorError("gone"), ValueError("a mistake"), SystemExit(3)])
def test_a_failure_is_kept_for_the_loop_and_ends_nothing(run: MirroredRun, error: BaseException) -> None:
    gate, protected = Gate(), set[int]()
    uploader = MirrorUploader(gate, run.extras, protected)  # type: ignore[arg-type]
    gate.error = error
    uploader.submit(run.save(1))
    gate.open.release()
    assert uploader.wait(60)
    assert uploader.failures() == [error]
    assert uploader.failures() == [] and protected == set()
    gate.error = None
    uploader.submit(run.save(2))
    gate.open.release()
    assert uploader.wait(60)
    assert uploader.failures() == []


def test_closing_leaves_an_upload_that_takes_longer_and_drops_what_waits(run: MirroredRun) -> None:
    gate, protected = Gate(), set[int]()
    uploader = MirrorUploader(gate, run.extras, protected)  # type: ignore[arg-type]
    uploader.submit(run.save(1))
    assert gate.started.acquire(timeout=60)
    uploader.submit(run.save(2))
    assert not uploader.wait(0.01)
    uploader.close()
    # What is in flight still reads its files.
    assert protected == {1}
    gate.open.release()
    assert uploader.wait(60)
    assert (gate.began, protected) == ([1], set())


def test_retention_leaves_what_is_in_flight(run: MirroredRun) -> None:
    gate = Gate()
    uploader = MirrorUploader(gate, run.extras, run.store.protected)  # type: ignore[arg-type]
    first = run.save(1)
    uploader.submit(first)
    assert gate.started.acquire(timeout=60)
    for step in (2, 3, 4):
        run.save(step)
    assert first.path.is_dir()
    gate.open.release()
    assert uploader.wait(60)
    run.save(5)
    assert not first.path.exists()


def test_checkpoints_of_a_run_arrive(run: MirroredRun) -> None:
    uploader = MirrorUploader(run.mirror, run.extras, run.store.protected)
    for step in (1, 2, 3, 4, 5):
        uploader.submit(run.save(step))
    assert uploader.wait(60)
    assert uploader.failures() == []
    assert run.standing() == 5
