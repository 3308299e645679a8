"""The power cuts of `power_cut.py`, with every system's training command as the writer.

A cut takes a picture of the disk; the same command is then given on what the picture holds. What each step's state was
is kept beside the disk, so that a state that loads and is wrong is seen.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from power_cut import MOUNTS, Found, run_power_cut

from peers.faults import Driver, Row
from peers.trial import Session

COMPARE = Path(__file__).with_name("compare.py")
MEGABYTES = 192


class Writer(Session):
    """A session that prints the number of each acknowledged step, and keeps the states in a file elsewhere."""

    def tell(self, event: str, step: int, **facts: Any) -> None:
        """Print or keep."""
        line = f"{step}" if event == "saved" else json.dumps([step, facts["digest"]])
        os.write(1 if event == "saved" else self.descriptor, f"{line}\n".encode())


def write_until_killed(train: Callable[[Session], None], folder: Path, shards: Path, states: Path) -> None:
    """Be the writer: the training command in `folder`, told of on standard output; what else it prints is dropped."""
    descriptor = os.open(states, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    train(Writer(run, shards, descriptor=descriptor))


def power_cut(driver: Driver, tries: int, seed: int, mount: str) -> Row:
    """Cut the power of a training command that saves after every step; start it again on what is left.

    Returns:
        tries; where every acknowledged save was there; resumes that failed and needed a human; resumes that silently
        went on from an older step than acknowledged; the most steps lost where it did resume; wrong states.
    """
    states = driver.work / f"states-{mount}"
    row: Row = {"mount": mount, "tries": 0}
    row |= dict.fromkeys(("all_there", "needed_human", "silently_older", "worst_loss", "wrong"), 0)

    def verify(folder: Path) -> Found:
        trial = driver.run(folder / "run", resume_only=True) if (folder / "run").is_dir() else None
        if trial is None:
            return Found(0)
        if not trial.resumed:
            return Found(None, trial.problem or "ended without a word")
        step, digest = trial.resumed["step"], trial.resumed["digest"]
        known = {tuple(json.loads(line)) for line in states.read_text().splitlines() if line.endswith("]")}
        return Found(step, "" if (step, digest) in known else "another state than was saved")

    system = driver.system.name
    command = [sys.executable, str(COMPARE), "--writer", system, "{folder}", str(driver.shards), str(states)]
    problems = set()
    for cut in run_power_cut(command, verify, tries, MOUNTS[mount], seed, MEGABYTES):
        row["tries"] += 1
        step = cut.found.step
        if cut.found.problem:
            problems.add(cut.found.problem)
        if step is None:
            row["needed_human"] += 1
            continue
        lost = max(0, cut.acknowledged - step)
        row["all_there"] += lost == 0 and not cut.found.problem
        row["silently_older"] += lost > 0
        row["worst_loss"] = max(row["worst_loss"], lost)
        row["wrong"] += bool(cut.found.problem)
    return row | {"problems": sorted(problems)}
