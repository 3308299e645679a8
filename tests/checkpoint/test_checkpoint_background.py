"""Saving beside training: one at a time, nothing lost, no failure silent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkpoint_faults import full_while, good_steps, injected, save

from ekiden.checkpoint.background import BackgroundWorker
from ekiden.checkpoint.store import CheckpointError, CheckpointStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run/checkpoints"


def test_a_save_in_the_background_is_the_same_save(folder: Path) -> None:
    store, saver = CheckpointStore(folder), BackgroundWorker("save")
    saver.submit(lambda: save(store, 1))
    saver.submit(lambda: save(store, 2))
    saver.wait()
    assert not saver.busy and saver.failures() == []
    assert good_steps(store) == [2, 1]


def test_at_most_one_save_is_in_flight() -> None:
    saver, release, running, most = BackgroundWorker("save"), threading.Event(), [], []

    def work() -> None:
        running.append(1)
        most.append(len(running))
        release.wait()
        running.pop()

    saver.submit(work)
    assert saver.busy
    submitter = threading.Thread(target=saver.submit, args=(work,))
    submitter.start()
    assert most == [1] or not most, "the second one waits for the first"
    release.set()
    submitter.join()
    saver.wait()
    assert most == [1, 1]


def test_a_failed_save_is_reported_once_and_the_next_one_runs(folder: Path) -> None:
    store, saver = CheckpointStore(folder), BackgroundWorker("save")
    with injected(full_while(folder)):
        saver.submit(lambda: save(store, 1))
        saver.wait()
    saver.submit(lambda: save(store, 2))
    saver.wait()
    (failure,) = saver.failures()
    assert isinstance(failure, CheckpointError) and str(failure) == "step 1: the disk is full"
    assert saver.failures() == []
    assert good_steps(store) == [2]


def test_a_process_does_not_wait_for_a_save_unless_it_asks() -> None:
    program = (
        "import sys, threading\n"
        "from ekiden.checkpoint.background import BackgroundWorker\n"
        "saver = BackgroundWorker('save')\n"
        "saver.submit(lambda: threading.Event().wait())\n"
        "assert saver.busy\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)
