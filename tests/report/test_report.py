"""The report: every extreme kept, sessions and marks right, the mixture exact, a page that cannot load anything."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiden.errors import UserError
from ekiden.report import RunReader, write_report
from ekiden.report.page import embed, packed_plotly, render
from ekiden.report.reduce import reduce_curve
from ekiden.report.sessions import count_samples
from ekiden.report.writer import ReportWriter
from ekiden.tokens.shares import plan_mixture

sys.path.insert(0, str(Path(__file__).parent))
from histories import write_run


@given(
    st.lists(st.floats(-1e6, 1e6, width=32) | st.just(float("nan")), min_size=1, max_size=400),
    st.integers(10, 60),
)
def test_a_reduced_curve_keeps_the_ends_the_extremes_and_the_gaps(values: list[float], points: int) -> None:
    x, y = reduce_curve(range(len(values)), values, points)
    assert x[0] == 0 and x[-1] == len(values) - 1 and x == sorted(set(x))
    assert len(x) <= max(points, len(values)) and len(x) <= 1.5 * points + 2
    finite = [value for value in values if value == value]
    shown = [value for value in y if value is not None]
    if finite:
        assert np.isclose([min(shown), max(shown)], [min(finite), max(finite)], rtol=1e-5).all()
    assert (None in y) == (len(finite) < len(values))


def test_sessions_marks_and_their_times_are_those_of_the_history(tmp_path: Path) -> None:
    reader = RunReader(write_run(tmp_path / "run", 1000))
    reader.update()
    data = reader.data()
    assert data["status"] == "completed: all steps done"
    assert [(s["first_step"], s["last_step"]) for s in data["sessions"]] == [
        (0, 250),
        (250, 500),
        (500, 750),
        (750, 1000),
    ]
    assert [s["status"] for s in data["sessions"]] == ["killed", "killed", "killed", "completed"]
    assert Counter(m["kind"] for m in data["marks"]) == {"interruption": 3, "oom": 1}
    assert "3600 s later" in data["marks"][0]["text"]
    assert len(data["curves"]["loss"]["x"]) == 1000
    assert set(data["evaluation"]["loss"]) == {"dutch", "english", "hindi", "mean of languages"}
    # 41,000 tokens/s x 70 MFLOP over two devices of 65 TFLOP/s
    assert data["curves"]["mfu"]["y"][0] == pytest.approx(41_000 * 7e7 / 2 / 65e12, rel=0.05)


def test_the_mixture_seen_is_counted_exactly() -> None:
    mixture = plan_mixture({"a": 300_000, "b": 40_000, "c": 900}, 64, 5)
    for first, end in ((0, 0), (0, 5), (100, 9_000), (4_096, 8_192), (4_000, 4_200)):
        languages = mixture.locate(np.arange(first, end))[0]
        assert count_samples(mixture, first, end).tolist() == np.bincount(languages, minlength=3).tolist()


def test_batches_left_out_by_a_roll_back_do_not_count_as_seen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20, sessions=1)
    with (run / "history.jsonl").open("a") as file:
        left_out = {"event": "rollback", "first_bad_step": 11, "batches_left_out": 3}
        file.write(json.dumps({"kind": "event", "step": 10, "time": 1.8e9, **left_out}) + "\n")
    reader = RunReader(run)
    reader.update()
    mixture = plan_mixture({"dutch": 400_000, "english": 900_000, "hindi": 50_000}, 64, 1)
    kept = np.concatenate([np.arange(0, 320), np.arange(416, 736)])
    expected = np.bincount(mixture.locate(kept)[0], minlength=3) / len(kept)
    assert [row["seen"] for row in reader.data()["mixture"]] == pytest.approx(expected.tolist())


def test_a_reader_keeps_up_with_a_run_and_with_steps_taken_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 100, sessions=1)
    reader = RunReader(run)
    assert reader.update() and not reader.update()
    lines = (run / "history.jsonl").read_text().splitlines(keepends=True)
    with (run / "history.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 101, "loss": 2.0')
        file.flush()
        assert not reader.update()  # half a line
        file.write("}\n")
    assert reader.update() and reader.train["step"][-1] == 101
    (run / "new").write_text("".join(lines[:50]))
    (run / "new").replace(run / "history.jsonl")
    assert reader.update() and len(reader.train["step"]) == sum('"train"' in line for line in lines[:50])


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 300)
    page, picture = write_report(run)
    text = page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "default-src 'none'" in text
    without_plotly = re.sub(r'id="plotly">[^<]*<', "", text)
    assert not re.search(r'(?:src|href)\s*=\s*["\']?https?:', without_plotly)
    assert "</script><script>window.hacked" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert data[0]["samples"][0]["languages"]["english"][0]["text"].startswith("</script>")


def test_the_plot_library_is_the_one_that_is_said(tmp_path: Path) -> None:
    script = gzip.decompress(packed_plotly())
    assert b"plotly.js (basic - minified) v4.1.1" in script[:200]
    # Of package/plotly-basic.min.js in npm's plotly.js-basic-dist-min 4.1.1.
    digest = "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
    assert hashlib.sha256(script).hexdigest() == digest


def test_markers_in_a_runs_texts_are_not_replaced(tmp_path: Path) -> None:
    reader = RunReader(write_run(tmp_path / "@@DATA@@", 20))
    reader.update()
    assert "@@DATA@@" in render(reader.data())
    assert json.loads(embed("a</script>\u2028")) == "a</script>\u2028"


def test_a_history_of_100_000_records_makes_a_page_below_1_mb_that_keeps_a_spike(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 100_000, spike=70_707)
    (page,) = write_report(run, picture=False)
    assert page.stat().st_size < 1_000_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])[0]  # type: ignore[index]
    loss = data["curves"]["loss"]
    assert data["records"] == 100_000 and data["points"] == 2000
    assert len(loss["x"]) <= 2000 and loss["y"][loss["x"].index(70_707)] == 50


def test_a_damaged_run_directory_still_makes_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 50)
    with (run / "history.jsonl").open("ab") as file:
        file.write(
            b'{"kind": "eval", "step": 60}\n\xff\xfe\n{"kind": "event", "step": 61, "event": "rollback"}\n'
        )
    (run / "result.json").write_text("{")
    (run / "config.yaml").write_text("a: [")
    (run / "checkpoints" / "step-00000050").mkdir(parents=True)
    write_report(run, picture=False)
    with pytest.raises(UserError, match=r"holds no history\.jsonl; give a run directory"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", 50)
    (run / "report.html").mkdir()
    writer = ReportWriter(run)
    writer.request()
    writer.finish()
    writer.finish()
    assert capsys.readouterr().err.count("report.html could not be written") == 1


def test_a_report_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forever = threading.Event()
    monkeypatch.setattr("ekiden.report.writer.write_page", lambda *_: forever.wait())
    writer = ReportWriter(write_run(tmp_path / "run", 50))
    assert writer.request() and not writer.request()
    writer.finish(seconds=0.2)
    assert "was not ready after" in capsys.readouterr().err
    forever.set()


def test_reports_beside_training_are_rare(tmp_path: Path) -> None:
    writer = ReportWriter(write_run(tmp_path / "run", 50))
    assert writer.request()
    assert writer._worker.wait(60)
    assert not writer.request()  # the first took more than a hundredth of the time since
    writer._written -= 1000 * writer._seconds
    assert writer.request()
    writer.finish()
