"""`ekiden.notebook` follows a run until it ends, and shows it in a real notebook's cell."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ekiden.errors import UserError
from ekiden.notebook import as_html, follow

sys.path.insert(0, str(Path(__file__).parent))
from histories import session_event, write_run

pytest.importorskip("matplotlib")


def test_it_follows_a_run_until_its_end(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps(session_event("start", 0, time.time())) + "\n")
    seen: list[dict[str, Any]] = []

    def train() -> None:
        for step in range(1, 6):
            time.sleep(0.03)
            with path.open("a") as file:
                file.write(
                    json.dumps({"kind": "train", "step": step, "loss": 1.0, "time": time.time()}) + "\n"
                )
        with path.open("a") as file:
            end = {"event": "stop", "status": "paused", "reason": "time limit", "time": time.time()}
            file.write(json.dumps({"kind": "event", "step": 5, **end}) + "\n")

    thread = threading.Thread(target=train)
    thread.start()
    follow(tmp_path, seconds=0.02, timeout=60, show=seen.append)
    thread.join()
    assert seen[-1]["step"] == 5 and len(seen) >= 2
    assert [data["step"] for data in seen] == sorted(data["step"] for data in seen)


def test_names_of_a_run_are_not_markup(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    follow(write_run(tmp_path / "<b>run", 20), show=seen.append)
    assert "<b>" not in as_html(seen[0]) and "validation loss, hindi" in as_html(seen[0])


def test_a_cell_shows_picture_and_table(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    run = write_run(tmp_path / "run", 20)
    cell = nbformat.v4.new_code_cell(f"from ekiden.notebook import follow\nfollow({str(run)!r})")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = notebook.cells[0].outputs[0]["data"]["text/html"]
    assert "data:image/png;base64," in shown and "completed: all steps done" in shown


def test_outside_a_notebook_it_says_what_to_use(tmp_path: Path) -> None:
    pytest.importorskip("IPython")
    with pytest.raises(UserError, match="in a terminal use ekiden dashboard"):
        follow(write_run(tmp_path / "run", 5))
