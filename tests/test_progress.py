"""Progress where there is no terminal: lines, not too many, and what they say of the time that is left."""

from __future__ import annotations

import pytest

from ekiden import progress
from ekiden.progress import Progress


class Watch:
    """A clock that stands where it is put."""

    now = 0.0

    def monotonic(self) -> float:
        """Return the time, in seconds."""
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The clock of `progress`."""
    made = Watch()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_the_last_line_is_not_said_twice(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    job = Progress(2, "step", "train")
    watch.now = progress.LINE_SECONDS + 1
    job.update(2, loss="6.5")
    job.close()
    assert capsys.readouterr().err == "train 2/2 step | loss 6.5\n"


def test_what_is_left_does_not_count_the_first_step(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    job = Progress(101, "step", "train")
    watch.now = 60.0  # it compiled
    job.update()
    assert "left" not in capsys.readouterr().err
    watch.now = 80.0
    job.update(10)
    assert capsys.readouterr().err == "train 11/101 step | left 3m00s\n"


def test_a_short_job_says_one_line(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "step", "train", initial=1) as job:
        job.update()
        job.update()
    assert capsys.readouterr().err == "train 3/3 step\n"
