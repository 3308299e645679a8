"""How long the report of a long history takes to open: from a fresh headless Chromium's request to the first drawn curve.

    python benchmarks/report_open.py [--records 100000] [--openings 5]

Needs chromium with its driver (Debian: apt-get install chromium chromium-driver) and selenium. Every opening is a new
browser with nothing cached or compiled; later openings in the same browser are faster. The history is made, not trained.
The last line is one JSON object: milliseconds, and the sizes of the page and the history in bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))
from browsing import start_browser, wait
from histories import write_run

from ekiden.report import write_report


def opening(page: Path) -> int:
    """Return the milliseconds until the first curve of `page` stood in a new browser."""
    browser = start_browser()
    if browser is None:
        sys.exit("no chromium with its driver; apt-get install chromium chromium-driver")
    try:
        browser.get(page.as_uri())
        script = "return document.documentElement.dataset.drawn"
        return int(wait(lambda: browser.execute_script(script)))
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--openings", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", options.records)
        began = time.perf_counter()
        (page,) = write_report(run, picture=False)
        seconds = time.perf_counter() - began
        times = [opening(page) for _ in range(options.openings)]
        result = {
            "records": options.records,
            "history_bytes": (run / "history.jsonl").stat().st_size,
            "page_bytes": page.stat().st_size,
            "written_seconds": round(seconds, 2),
            "opened_ms": times,
            "opened_ms_median": statistics.median(times),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
