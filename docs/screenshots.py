"""Pictures for the documentation: the report and the dashboard of real runs, on a phone and a desktop, light and dark.

    python docs/screenshots.py RUN [RUN...] [--output docs/images] [--height 1500]

The report is the first run's. Needs chromium with its driver, selenium and the extra `dashboard`.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

import uvicorn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))
from browsing import DESKTOP, PHONE, open_page, picture, start_browser, wait

from ekiden.report import write_report
from ekiden.report.dashboard import build_app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument(
        "--height", type=int, default=1500, help="of each picture, in CSS pixels; 0: the whole page"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    app = build_app([str(run) for run in options.runs], ["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    threading.Thread(target=server.run, daemon=True).start()
    wait(lambda: server.started)
    page, _ = write_report(options.runs[0])
    port = server.servers[0].sockets[0].getsockname()[1]
    browser = start_browser()
    for name, address in (("report", page.as_uri()), ("dashboard", f"http://127.0.0.1:{port}")):
        for width, size in (("phone", PHONE), ("desktop", DESKTOP)):
            for scheme in ("light", "dark"):
                open_page(browser, address, size, dark=scheme == "dark")
                picture(browser, options.output / f"{name}-{width}-{scheme}.png", options.height)
    browser.get("about:blank")
    browser.quit()
    server.should_exit = True


if __name__ == "__main__":
    main()
