"""Starts of several ranks for `test_ranks`, all from one process that imports torch once.

    python tests/distributed/scenarios.py SHARDS FOLDER

Prints one JSON object: what each scenario left. A test reads its part and says what it should have been. All train the
same global batch, so that one run of one process is what all are compared with; a run is used for several faults where one
does not hide the other, for most of a start's time goes before its first step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from campaign import outcome, settings
from ranks import at_microbatch, infinite, losses, oom, out_of_memory, run_ranks, signalled

from ekiden.training import step
from ekiden.training.history import read_history
from ekiden.training.ranks import Ranks

STEPS = 4
GLOBAL_BATCH = 16
COMMON: dict[str, Any] = {"save_steps": 2, "eval_steps": 0, "sample_tokens": 1, "rank_timeout": "20s"}


class Scenarios:
    """Runs of two ranks beside the same run of one."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder

    def start(
        self, name: str, world: int, begins: int = 0, microbatch: int = 4, **more: Any
    ) -> dict[str, Any]:
        """Start the run `name` with `world` ranks; return what it left.

        Args:
            begins: ranks that the run began with, where others start now.
        """
        faults = {key: more.pop(key, None) for key in ("fault", "kill", "local_world")}
        run = self.folder / name
        batch = {
            "batch_size": microbatch,
            "gradient_accumulation_steps": GLOBAL_BATCH // microbatch // (begins or world),
        }
        options = {**COMMON, **batch, **more}
        config = settings("gemma3-tiny", self.shards, run, options.pop("steps", STEPS), **options)
        number = len(list(self.folder.glob(f"{name}-log-*")))
        done = run_ranks(config, world, self.folder / f"{name}-log-{number}", limit_seconds=120, **faults)
        history = list(read_history(run / "history.jsonl"))
        result = run / "result.json"
        return {
            "statuses": done.statuses,
            "log": done.log[-4000:],
            "killed": done.killed,
            "samples": sorted(done.samples.items()),
            "losses": sorted(losses(run).items()),
            "evaluations": [r["macro"]["loss"] for r in history if r["kind"] == "eval"],
            "events": [{k: v for k, v in r.items() if k != "time"} for r in history if r["kind"] == "event"],
            "checkpoints": sorted(path.name for path in (run / "checkpoints").glob("step-*")),
            "result": json.loads(result.read_text()) if result.exists() else None,
            "weights": outcome(run).weights if list((run / "checkpoints").glob("step-*")) else None,
        }


def scenarios(shards: Path, folder: Path) -> dict[str, Any]:
    """Run everything."""
    start = Scenarios(shards, folder).start
    both: dict[str, Any] = {"one": start("one", 1), "ddp": start("ddp", 2, parallel="ddp")}
    both["hybrid"] = start("hybrid", 4, parallel="fsdp", local_world=2)
    for parallel in ("ddp", "fsdp"):
        # In the second step, of which rank 1 does microbatches 3 and 4.
        both[f"{parallel} stopped"] = start(
            f"{parallel}-stop", 2, parallel=parallel, fault=signalled(1, count=3)
        )
        both[f"{parallel} resumed on 1"] = start(f"{parallel}-stop", 1, begins=2, parallel=parallel)
    both["exact one"] = start("exact-one", 1, elastic_exact=True)
    both["exact two"] = start("exact-two", 2, elastic_exact=True)
    masked = {"document_mask": True, "sliding_window": 10}
    for name, world, more in (
        ("masked ddp", 1, {"elastic_exact": True, "parallel": "ddp"}),
        ("masked fsdp", 2, {"parallel": "fsdp"}),
    ):
        both[name] = start(name.replace(" ", "-"), world, **masked, **more)
        stopped = f"{name}-stop".replace(" ", "-")
        both[f"{name} stopped"] = start(stopped, 2, fault=signalled(1, count=3), **masked, **more)
        both[f"{name} resumed"] = start(stopped, 2, **masked, **more)
    both["oom ddp"] = start("oom-ddp", 2, microbatch=8, parallel="ddp", fault=lambda rank: _no_memory(rank))
    auto = {"batch_size": "auto", "global_batch_size": GLOBAL_BATCH, "gradient_accumulation_steps": 1}
    both["auto"] = start("auto", 2, parallel="ddp", fault=lambda rank: _little_memory(rank), **auto)
    both["auto fsdp"] = start("auto-fsdp", 2, parallel="fsdp", **auto)
    for number, phase in enumerate(("forward", "backward", "update", "")):
        fault = oom(1, phase, count=2 * (number > 0) + 1) if phase else None
        both[f"oom fsdp {phase}"] = start("oom-fsdp", 2, microbatch=8, parallel="fsdp", fault=fault)
    both["infinite"] = start("infinite", 2, fault=infinite(1, 2), steps=3)
    both["deadline"] = start("deadline", 2, fault=lambda rank: _late(rank), max_time="1h")
    both["killed while meeting"] = start("killed", 2, fault=lambda rank: _gone(rank), parallel="ddp")
    both["killed"] = start("killed", 2, fault=signalled(1, signal.SIGKILL, count=6), parallel="ddp")
    both["killed, again"] = start("killed", 2, parallel="ddp")
    return both


def _no_memory(rank: int) -> None:
    """Let rank 1 have no memory three times: forward in step 1, backward in step 2, in the update of step 4."""
    if rank != 1:
        return
    oom(1, "update", count=4)(rank)
    # Step 1: a microbatch of 8 fails, two of 4 follow; step 2: the second of 4 fails, four of 2 follow.
    at_microbatch(1, "forward", out_of_memory)
    forward = step.fault_hook
    at_microbatch(2 + 2, "backward", out_of_memory)
    backward = step.fault_hook
    assert forward and backward

    def each(index: int, phase: str) -> None:
        forward(index, phase)
        backward(index, phase)

    step.fault_hook = each


def _little_memory(rank: int) -> None:
    """Let rank 1 have room for 2 samples: the trials of 8 and of 4 fail, each after that of one, which makes the moments."""
    if rank != 1:
        return
    trials = 0

    def hook(index: int, phase: str) -> None:
        nonlocal trials
        trials += index == -2 and phase == "forward"
        if index == -2 and phase == "forward" and trials in (2, 4):
            out_of_memory()

    step.fault_hook = hook


def _gone(rank: int) -> None:
    """Let rank 1 end after it has met rank 0, and before they watch each other."""
    if rank == 1:
        Ranks.gather = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]


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
