"""The history: every step once, torn lines mended, NaN as text."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from ekiden.training.history import History, history_columns, read_history


def write(path: Path, steps: range) -> None:
    history = History(path, steps.start - 1)
    for step in steps:
        history.add("train", step, loss=1.0 / step)
    history.close()


def test_a_resume_takes_later_steps_out_and_remembers_their_losses(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write(path, range(1, 8))
    history = History(path, 4)
    assert history.replaced == {5: 1 / 5, 6: 1 / 6, 7: 1 / 7}
    assert [r["step"] for r in read_history(path)] == [1, 2, 3, 4]


def test_events_stay_when_their_steps_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path, 0)
    history.add("train", 1, loss=2.0)
    history.event("oom", 1)
    history.close()
    History(path, 0)
    assert [r["kind"] for r in read_history(path)] == ["event"]


def test_a_torn_line_is_dropped_and_the_file_mended(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write(path, range(1, 4))
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "step": 4, "lo\xff')
    history = History(path, 3)
    history.add("train", 4, loss=0.25)
    history.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_floats_keep_every_bit_and_nan_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    value = 0.1 + 0.2
    history = History(path, 0)
    history.add("train", 1, loss=value, grad_norm=float("nan"))
    history.close()
    record = next(read_history(path))
    assert record["loss"] == value
    assert record["grad_norm"] == "nan"
    assert history_columns(read_history(path))["train"]["loss"] == [value]


def test_records_wait_in_memory_for_a_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, filler = small_disk / "history.jsonl", small_disk / "filler"
    history = History(path, 0)
    history.event("start", 0)
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    for step in range(1, 6):
        history.add("train", step, loss=1.0 / step, text="x" * 5000)
    assert len(list(read_history(path))) < 6
    filler.unlink()
    history.add("train", 6, loss=0.1)
    assert [r["step"] for r in read_history(path)] == [0, 1, 2, 3, 4, 5, 6]
    assert path.read_bytes().count(b"\n") == 7  # and no torn line between them
    history.close()
    assert (
        capsys.readouterr().err.count("history.jsonl cannot be written (the disk is full); its records wait")
        == 1
    )
