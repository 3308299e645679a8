"""`report.html`: one file that needs no network, out of a run's figures, plotly.js and three small assets.

plotly.js lies in the page compressed, and the page forbids itself every request. It is the project's own bundle of lines
and bars, `plotly.js-basic-dist-min` 4.1.1 of npm (MIT, assets/plotly-LICENSE.txt), packed by `gzip -9 -n`: a quarter of the
bundle in the Python package plotly, whose compilation alone took a browser 1.4 s.
"""

from __future__ import annotations

import base64
import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.errors import UserError
from ekiden.report.reading import RunReader

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
"""Inline only: the page cannot load or send anything."""


def write_report(run: str | Path, output: str | Path | None = None, picture: bool = True) -> list[Path]:
    """Write the report of `run`: `ekiden report`.

    Args:
        output: of the page. Default: RUN/report.html.
        picture: write loss.png beside it.

    Returns:
        What was written.

    Raises:
        UserError: `run` is no run directory, the extra is missing, or the file cannot be written.
    """
    reader = RunReader(run)
    reader.update()
    page = Path(output) if output else reader.path / "report.html"
    data = reader.data()
    try:
        write_page(data, page)
        if picture:
            from ekiden.report.picture import write_picture

            write_picture(data, page.with_name("loss.png"))
    except OSError as error:
        raise UserError(
            f"{page} cannot be written ({error.strerror or error}); give another --output"
        ) from None
    return [page, page.with_name("loss.png")] if picture else [page]


def write_page(data: dict[str, Any], path: Path) -> None:
    """Write the page of a run's figures; a reader sees the one before or the whole new one."""
    files.write_atomic(path, render(data).encode())


def render(data: dict[str, Any]) -> str:
    """Return the page for `RunReader.data`'s figures."""
    parts = {
        "POLICY": CONTENT_SECURITY_POLICY,
        "STYLE": asset("page.css"),
        "BODY": asset("body.html"),
        "DATA": embed([data]),
        "PLOTLY": compressed_plotly(),
        "CHARTS": asset("charts.js"),
        "TABLES": asset("tables.js"),
        "START": asset("report.js"),
    }
    page = asset("report.html")
    # Each marker once, so that no text of the run is ever read as one.
    pieces = page.split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def embed(value: Any) -> str:
    """Return `value` as JSON that no text in it can end the script element of."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@functools.cache
def asset(name: str) -> str:
    """Return one of the package's own files."""
    return (resources.files("ekiden.report") / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def packed_plotly() -> bytes:
    """Return plotly.js, gzipped: 0.4 MB of 1.2 MB."""
    return (resources.files("ekiden.report") / "assets" / "plotly-basic.min.js.gz").read_bytes()


@functools.cache
def compressed_plotly() -> str:
    """Return plotly.js, gzipped, as base64."""
    return base64.b64encode(packed_plotly()).decode()
