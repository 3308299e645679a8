"""The report and the dashboard in headless Chromium: nothing on the console, nothing over the network, every point drawn.

Skipped where there is no chromium with its driver (Debian: apt-get install chromium chromium-driver). With
EKIDEN_SCREENSHOTS=FOLDER, pictures of both at phone and desktop width, light and dark, are kept there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ekiden.report import write_report
from ekiden.report.dashboard import build_app
from ekiden.training.history import History, read_history

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
sys.path.insert(0, str(Path(__file__).parent))
import campaign

pytest.importorskip("starlette")
pytest.importorskip("selenium")
from browsing import DESKTOP, PHONE, open_page, picture, points, start_browser, wait
from histories import write_run

STEPS = 24


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield a headless Chromium that records its console and every request."""
    opened = start_browser()
    if opened is None:
        pytest.skip("no chromium with its driver; apt-get install chromium chromium-driver")
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real run of three sessions, the first two killed."""
    folder = tmp_path_factory.mktemp("real")
    shards = campaign.make_shards(folder)
    config = campaign.settings(
        "gemma3-tiny", shards, folder / "run", STEPS, save_steps=2, eval_steps=4, sample_steps=8
    )
    for _ in range(2):
        assert (
            campaign.trial(config, folder / "log", setup=campaign.Aim("at a rename", 14).take).status is None
        )
    assert campaign.trial(config, folder / "log").status == 0
    return folder / "run"


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Return a function that serves runs on a free port and returns the address."""
    import uvicorn

    servers = []

    def start(*runs: Path) -> str:
        app = build_app([str(path) for path in runs], ["127.0.0.1"])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        wait(lambda: server.started)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def check_silence(browser: Any) -> None:
    """Assert that the console is empty and that nothing was asked of another machine."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []
    requests = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    assert requests
    assert [u for u in requests if not u.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))] == []


def keep(browser: Any, name: str) -> None:
    """Keep a picture of the whole page where the user asked for pictures; no page is wider than the screen."""
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    if folder := os.environ.get("EKIDEN_SCREENSHOTS"):
        picture(browser, Path(folder) / f"{name}.png")


def losses(run: Path, kind: str = "train") -> int:
    return sum(record["kind"] == kind for record in read_history(run / "history.jsonl"))


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (PHONE, True)])
def test_the_report_of_an_interrupted_run(browser: Any, run: Path, size: tuple[int, int], dark: bool) -> None:
    page, _ = write_report(run)
    open_page(browser, page.as_uri(), size, dark)
    languages = 3  # two and their mean
    # Training, each language, and a mark for each interruption and each resume that was verified.
    marks = browser.execute_script("return ekiden.runs[0].marks.length")
    assert marks >= 2
    assert points(browser, "loss") == [STEPS, *[losses(run, "eval")] * languages, marks]
    assert points(browser, "bits") == [losses(run, "eval")] * languages
    assert points(browser, "gradient") == [STEPS]
    rows = browser.execute_script("return document.querySelectorAll('#sessions tr').length")
    assert rows == 1 + 3
    assert "completed" in browser.execute_script("return document.getElementById('status').textContent")
    check_silence(browser)
    keep(browser, f"report-{'phone' if size == PHONE else 'desktop'}")


def test_the_dashboard_follows_a_run_and_its_playground_answers(
    browser: Any, run: Path, serve: Callable[..., str], tmp_path: Path
) -> None:
    live = shutil.copytree(run, tmp_path / "live")
    open_page(browser, serve(live), DESKTOP)
    assert points(browser, "gradient") == [STEPS]
    history = History(live / "history.jsonl", STEPS)
    for step in range(STEPS + 1, STEPS + 11):
        history.add("train", step, loss=3.0, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=100.0)
    wait(lambda: points(browser, "gradient") == [STEPS + 10])
    assert points(browser, "loss")[0] == STEPS + 10
    history.close()
    wait(lambda: browser.execute_script("return document.querySelectorAll('#checkpoint option').length") >= 3)
    browser.execute_script(
        "document.getElementById('prompt').value = 'The river'; document.getElementById('tokens').value = 8"
    )
    browser.execute_script("document.getElementById('generate').click()")
    wait(
        lambda: browser.execute_script("return document.getElementById('answer').dataset.done") == "yes", 120
    )
    answer = browser.execute_script("return document.getElementById('answer').textContent")
    assert answer.startswith("The river") and len(answer) > len("The river")
    assert browser.execute_script("return document.querySelectorAll('#answer .bad').length") == 0
    check_silence(browser)
    keep(browser, "dashboard-desktop")
    browser.get("about:blank")  # before its server ends


def test_two_runs_are_compared_on_a_phone(
    browser: Any, run: Path, serve: Callable[..., str], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", 40)
    open_page(browser, serve(run, other), PHONE)
    names = browser.execute_script("return document.getElementById('plot-gradient').data.map(t => t.name)")
    assert names == ["run", "other"] and points(browser, "gradient") == [STEPS, 40]
    browser.execute_script("document.querySelectorAll('#runs input')[0].click()")
    wait(lambda: points(browser, "gradient") == [40])
    # A sample text that is markup stayed text.
    assert browser.execute_script("return window.hacked === undefined")
    assert "window.hacked" in browser.execute_script("return document.getElementById('samples').textContent")
    check_silence(browser)
    keep(browser, "dashboard-phone")
    browser.get("about:blank")


def test_the_report_of_100_000_steps_opens(browser: Any, tmp_path: Path, record_property: Any) -> None:
    run = write_run(tmp_path / "run", 100_000, log_steps=4)
    (page,) = write_report(run, picture=False)
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.get(page.as_uri())
    # Milliseconds from the request to the first curve, on the clock and of the page's own processor time: printed, not
    # judged, as machines differ and this one may be busy.
    drawn = wait(lambda: browser.execute_script("return document.documentElement.dataset.drawn"))
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    processor = 1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration")
    print(
        f"100,000 steps: {page.stat().st_size / 1e6:.2f} MB, drawn after {drawn} ms, {processor:.0f} ms of processor"
    )
    record_property("milliseconds", int(drawn))
    browser.execute_cdp_cmd("Performance.disable", {})
    open_page(browser, page.as_uri(), DESKTOP)
    assert 1000 <= points(browser, "gradient")[0] <= 2002
    check_silence(browser)
    keep(browser, "report-long")
