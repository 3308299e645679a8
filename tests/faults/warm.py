"""The short campaigns of the suite, in a process of their own: it forks its trials, and pytest's has threads.

`conftest` starts it and gives it one task for each campaign, {"kills": PRESET} or {"megabytes": N, "amid_training": BOOL,
"auto": BOOL}; the answers are rows of the campaign's table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign
import memory

KILLS, STEPS = 6, 18
"""18 steps have 6 saves, so that 2 checkpoints are removed; `make faults` takes more of both."""


def begin(folder: Path) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Return what does one campaign in `folder`."""
    shards = campaign.make_shards(folder)

    def work(task: dict[str, Any]) -> list[dict[str, Any]]:
        if preset := task.get("kills"):
            (folder / preset).mkdir()
            return campaign.campaign(preset, KILLS, shards, folder / preset, STEPS)
        return [memory.sweep(shards, folder, [task["megabytes"]], task["amid_training"], task["auto"])]

    return work
