"""`loss.png`: the training loss and each language's validation loss, for a notebook or a README.

Takes the figures of `reading.RunReader`; drawn by matplotlib without a display and without its global state, so that
a thread may do it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.optional import require

COLOURS = ("#1f6fb4", "#d1651a", "#2b8a5a", "#a53fa0", "#8a6d1f", "#c0394b", "#4a5fc1", "#6b7280")
"""Of the curves, in the page as here: the training loss first, then a language each."""


def write_picture(data: dict[str, Any], path: Path) -> None:
    """Write the picture of `data` to `path`; a reader sees the one before or the whole new one."""
    image = io.BytesIO()
    loss_figure(data).savefig(image, dpi=110, format="png")
    files.write_atomic(path, image.getvalue())


def loss_figure(data: dict[str, Any]) -> Any:
    """Return a matplotlib figure of the losses, sessions as bands.

    Raises:
        UserError: matplotlib is missing.
    """
    figure = require("matplotlib.figure", "loss.png", extra="report").Figure(
        figsize=(8, 4.2), layout="constrained"
    )
    axes = figure.add_subplot()
    for number, session in enumerate(data["sessions"]):
        if number % 2:
            axes.axvspan(session["first_step"], session["last_step"], color="0.93", linewidth=0)
    curve = data["curves"].get("loss", {"x": [], "y": []})
    values = [float("nan") if value is None else value for value in curve["y"]]
    axes.plot(curve["x"], values, color=COLOURS[0], linewidth=1, alpha=0.8, label="training")
    for number, (language, points) in enumerate(data["evaluation"]["loss"].items()):
        colour = COLOURS[1 + number % (len(COLOURS) - 1)]
        axes.plot(
            points["x"], points["y"], color=colour, marker="o", markersize=3, linewidth=1.4, label=language
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(f"{data['name']}: step {data['step']}, {len(data['sessions'])} sessions", fontsize=11)
    axes.grid(color="0.88", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure
