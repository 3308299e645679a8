"""A headless Chromium that opens a report or a dashboard: for tests, benchmarks/report_open.py and docs/screenshots.py."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHONE, DESKTOP = (390, 844), (1280, 900)
"""Width and height in CSS pixels."""


def start_browser() -> Any:
    """Return a driven Chromium that records its console and every request, or None where there is none."""
    from selenium import webdriver

    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not driver or not chromium:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--hide-scrollbars")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_page_load_timeout(60)
    return opened


def wait(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
    return value


def open_page(browser: Any, address: str, size: tuple[int, int], dark: bool = False) -> None:
    """Open `address` at a width, scrolled through once so that every curve is drawn."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(address)
    wait(lambda: browser.execute_script("return !!document.querySelector('#plot-loss .main-svg')"))
    for position in range(0, 8000, 400):
        browser.execute_script(f"window.scrollTo(0, {position})")
        time.sleep(0.03)
    wait(lambda: points(browser, "rate"))
    browser.execute_script("window.scrollTo(0, 0)")


def points(browser: Any, chart: str) -> list[int]:
    """Return how many points each curve of a chart has."""
    script = (
        f"const plot = document.getElementById('plot-{chart}'); return (plot.data || []).map(t => t.x.length)"
    )
    return browser.execute_script(script)


def picture(browser: Any, path: Path, height: int | None = None) -> None:
    """Keep a picture of the page in `path`; of its upper `height` CSS pixels where given."""
    asked: dict[str, Any] = {"format": "png", "captureBeyondViewport": True}
    if height:
        width = browser.execute_script("return window.innerWidth")
        asked["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", asked)
    path.write_bytes(base64.b64decode(shot["data"]))
