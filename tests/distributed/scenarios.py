"""Starts of several ranks for `test_ranks`, all from one process that imports torch once.

    python tests/distributed/scenarios.py SHARDS FOLDER

Prints one JSON object: what each scenario left. A test reads its part and says what it should have been.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import ranks
from campaign import outcome, settings
from ranks import infinite, oom, run_ranks, signalled

from ekiden.training.history import read_history

STEPS = 6
COMMON = {"save_steps": 2, "eval_steps": 4}


class Scenarios:
    """Runs of two ranks beside the same run of one."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder

    def start(self, name: str, world: int, begins: int = 0, **more: Any) -> dict[str, Any]:
        """Start the run `name` with `world` ranks; return what it left."""
        faults = {key: more.pop(key, None) for key in ("fault", "kill", "local_world")}
        run = self.folder / name
        # The batch is that of a start on `begins` ranks, where others begin than start now.
        options = ranks.options(begins or world, **{**COMMON, **more})
        config = settings("gemma3-tiny", self.shards, run, STEPS, **options)
        number = len(list(self.folder.glob(f"{name}-log-*")))
        done = run_ranks(config, world, self.folder / f"{name}-log-{number}", limit_seconds=120, **faults)
        history = list(read_history(run / "history.jsonl"))
        return {
            "statuses": done.statuses,
            "log": done.log[-4000:],
            "killed": done.killed,
            "samples": sorted(done.samples.items()),
            "losses": sorted(ranks.losses(run).items()),
            "evaluations": [r["macro"]["loss"] for r in history if r["kind"] == "eval"],
            "events": [{k: v for k, v in r.items() if k != "time"} for r in history if r["kind"] == "event"],
            "checkpoints": sorted(path.name for path in (run / "checkpoints").glob("step-*")),
            "result": json.loads((run / "result.json").read_text())
            if (run / "result.json").exists()
            else None,
            "weights": outcome(run).weights if list((run / "checkpoints").glob("step-*")) else None,
        }


def scenarios(shards: Path, folder: Path) -> dict[str, Any]:
    """Run everything."""
    start = Scenarios(shards, folder).start
    both: dict[str, Any] = {"one": start("one", 1)}
    for parallel in ("ddp", "fsdp"):
        both[parallel] = start(parallel, 2, parallel=parallel)
        both[f"{parallel} stopped"] = start(f"{parallel}-stop", 2, parallel=parallel, fault=signalled(1))
        both[f"{parallel} resumed on 1"] = start(f"{parallel}-stop", 1, begins=2, parallel=parallel)
    both["hybrid"] = start("hybrid", 4, parallel="fsdp", local_world=2)
    both["exact one"] = start("exact-one", 1, elastic_exact=True)
    both["exact two"] = start("exact-two", 2, elastic_exact=True)
    for phase in ("backward", "update"):
        both[f"oom {phase}"] = start(
            f"oom-{phase}", 2, batch_size=2, gradient_accumulation_steps=2, fault=oom(1, phase, count=5)
        )
    halves = {"parallel": "fsdp", "batch_size": 2, "gradient_accumulation_steps": 2}
    both["oom in shards"] = start("oom-fsdp", 2, **halves, fault=oom(1, "backward", count=5))
    both["oom in shards, again"] = start("oom-fsdp", 2, **halves)
    both["infinite"] = start("infinite", 2, fault=infinite(1, 3))
    both["deadline"] = start("deadline", 2, fault=lambda rank: _late(rank), max_time="1h")
    both["killed"] = start(
        "killed", 2, fault=signalled(1, signal.SIGKILL, count=13), save_steps=2, parallel="ddp"
    )
    both["killed, again"] = start("killed", 2, parallel="ddp")
    return both


def _late(rank: int) -> None:
    """Make one rank an hour older than the other."""
    if rank == 1:
        from ekiden.training import interruption

        interruption.process_age = lambda pid=None: 3590.0  # type: ignore[assignment]


if __name__ == "__main__":
    results = scenarios(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)
