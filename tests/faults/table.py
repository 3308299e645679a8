"""The whole fault campaign: every driver of this folder after the other, one table of all that they did.

    make faults            or            python tests/faults/table.py [--kills 250] [--only sigkill,damage]

Each driver is a program of its own with its own page of help; what they print on the way goes to standard error. The
last line printed is one JSON object; the exit status is 1 where anything was lost, or anything a driver looks for was
not found. Hours on a busy machine, about one on a quiet one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import Row, report

DRIVERS = {
    "sigkill": "campaign.py",
    "syscalls": "syscalls.py",
    "power_cut": "power_cut.py",
    "damage": "damage.py",
    "memory": "memory.py",
}
COLUMNS = ("fault", "tries", "resumed", "bit_identical", "data_lost")


def drive(name: str, options: list[str]) -> tuple[list[Row], bool]:
    """Run one driver; return its rows and whether it passed."""
    command = [sys.executable, str(Path(__file__).with_name(DRIVERS[name])), *options]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
        rows, passed = result["rows"], result["passed"] and done.returncode == 0
    except (IndexError, ValueError, KeyError):
        return [{"fault": f"{name}: the driver itself failed", "tries": 0}], False
    if reason := result.get("skipped"):
        rows = [{"fault": f"{name}: not run, {reason}"}]
    return [{column: row.get(column, "") for column in COLUMNS} for row in rows], passed


def main() -> int:
    """Run the drivers and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=250, help="SIGKILLs for each of the two families")
    parser.add_argument("--tries", type=int, default=40, help="power cuts for each way of mounting")
    parser.add_argument("--only", default=",".join(DRIVERS), help="drivers, with commas")
    options = parser.parse_args()
    arguments = {"sigkill": ["--kills", str(options.kills)], "power_cut": ["--tries", str(options.tries)]}
    rows: list[Row] = []
    passed, began = True, time.monotonic()
    for name in options.only.split(","):
        if name not in DRIVERS:
            parser.error(f"--only {name}: there are {', '.join(DRIVERS)}")
        found, good = drive(name, arguments.get(name, []))
        rows += found
        passed &= good
    return report("all", rows, passed, seconds=round(time.monotonic() - began))


if __name__ == "__main__":
    sys.exit(main())
