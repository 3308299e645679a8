"""A run followed in a Jupyter cell: its losses as a picture and its figures as a table, drawn again while it trains.

    from ekiden.notebook import follow
    follow("run")

Reads the run directory only, so the training may be another cell's, another process's or another machine's. A picture
and a table are plain outputs: they stay in the notebook's file, and every front end shows them.
"""

from __future__ import annotations

import html
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ekiden.errors import UserError
from ekiden.optional import require
from ekiden.report.picture import loss_figure
from ekiden.report.reading import RunReader


def follow(
    run: str | Path,
    seconds: float = 5.0,
    timeout: float | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Show `run` in this cell until it ends; interrupting the cell ends the watching, not the run.

    Args:
        seconds: between two looks at the history.
        timeout: seconds after which to stop looking; None: never. 0: once.
        show: takes the figures (`RunReader.data`) instead of the cell.

    Raises:
        UserError: `run` is no run directory, or this is no notebook.
    """
    reader, draw = RunReader(run), show or _cell()
    began = time.monotonic()
    try:
        while True:
            if reader.update() or not reader.train["step"]:
                draw(reader.data())
            over = timeout is not None and time.monotonic() - began >= timeout
            if over or not reader.sessions.open_session():
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        return


def _cell() -> Callable[[dict[str, Any]], None]:
    """Return a function that shows figures in the cell being run, in place of what it showed before."""
    shown = require("IPython.display", "ekiden.notebook")
    handle = shown.display(shown.HTML(""), display_id=True)
    if handle is None:
        raise UserError(
            "ekiden.notebook shows a run in a notebook's cell; in a terminal use ekiden dashboard"
        )

    def show(data: dict[str, Any]) -> None:
        handle.update(shown.HTML(as_html(data)))

    return show


def as_html(data: dict[str, Any]) -> str:
    """Return the picture and the table of a run's figures."""
    import base64

    picture = io.BytesIO()
    loss_figure(data).savefig(picture, format="png", dpi=90)
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in table(data)
    )
    image = base64.b64encode(picture.getvalue()).decode()
    return f"<img alt='losses of {html.escape(data['name'])}' src='data:image/png;base64,{image}'><table>{rows}</table>"


def table(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what stands beside the picture, as (name, value)."""
    of = f" of {data['max_steps']:,}" if data["max_steps"] else ""
    rows = [("status", data["status"]), ("step", f"{data['step']:,}{of}")]
    if data["tokens"]:
        rows.append(("tokens", f"{data['tokens']:,.0f}"))
    if data["loss"] is not None:
        rows.append(("training loss", f"{data['loss']:.4f}"))
    rows += [
        (f"validation loss, {name}", f"{c['y'][-1]:.4f}") for name, c in data["evaluation"]["loss"].items()
    ]
    speed = data["curves"].get("tokens_per_second")
    if speed and speed["y"][-1] is not None:
        rows.append(("tokens a second", f"{speed['y'][-1]:,.0f}"))
    interruptions = sum(mark["kind"] == "interruption" for mark in data["marks"])
    rows.append(("sessions", f"{len(data['sessions'])}, {interruptions} interruptions"))
    return rows
