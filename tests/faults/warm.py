"""The short campaigns of the suite, in one process that has imported everything: an import of torch costs 6 s of CPU.

A process of its own, because it forks its trials, and pytest's has threads. `conftest` starts it, writes a line of JSON
for each campaign to its standard input, {"kills": PRESET} or {"megabytes": N, "amid_training": BOOL, "auto": BOOL}, and reads the
rows from its standard output.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import campaign
import memory

KILLS, STEPS = 6, 18
"""18 steps have 6 saves, so that 2 checkpoints are removed; `make faults` takes more of both."""


def work(task: dict[str, Any], shards: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one campaign."""
    if preset := task.get("kills"):
        (folder / preset).mkdir()
        return campaign.campaign(preset, KILLS, shards, folder / preset, STEPS)
    return [memory.sweep(shards, folder, [task["megabytes"]], task["amid_training"], task["auto"])]


def main() -> None:
    """Answer until there are no more lines."""
    with tempfile.TemporaryDirectory() as name:
        shards = campaign.make_shards(Path(name))
        for line in sys.stdin:
            print(json.dumps(work(json.loads(line), shards, Path(name))), flush=True)


if __name__ == "__main__":
    main()
