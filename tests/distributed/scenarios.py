"""Starts of several ranks for `test_ranks`, all forked from one process that does what it is asked for and keeps it.

A test asks for a scenario by name, and says what it should have left. All train the same global batch, so that one run of
one process is what all are compared with; a run is used for several faults where one does not hide the other, for most of a
start's time goes before its first step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from campaign import outcome, settings
from ranks import at_microbatch, infinite, losses, oom, out_of_memory, run_ranks, signalled

from ekiden.training import microbatch, step
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
        self, run: str, world: int, begins: int = 0, microbatch: int = 4, **more: Any
    ) -> dict[str, Any]:
        """Start `run` with `world` ranks; return what it left.

        Args:
            begins: ranks that the run began with, where others start now.
        """
        faults = {key: more.pop(key, None) for key in ("fault", "kill", "local_world")}
        path = self.folder / run
        batch = {
            "batch_size": microbatch,
            "gradient_accumulation_steps": GLOBAL_BATCH // microbatch // (begins or world),
        }
        options = {**COMMON, **batch, **more}
        preset, steps = options.pop("preset", "gemma3-tiny"), options.pop("steps", STEPS)
        config = settings(preset, self.shards, path, steps, **options)
        number = len(list(self.folder.glob(f"{run}-log-*")))
        done = run_ranks(config, world, self.folder / f"{run}-log-{number}", limit_seconds=120, **faults)
        history = list(read_history(path / "history.jsonl"))
        result = path / "result.json"
        return {
            "statuses": done.statuses,
            "log": done.log[-4000:],
            "killed": done.killed,
            "samples": sorted(done.samples.items()),
            "losses": sorted(losses(path).items()),
            "evaluations": [r["macro"]["loss"] for r in history if r["kind"] == "eval"],
            "events": [{k: v for k, v in r.items() if k != "time"} for r in history if r["kind"] == "event"],
            "checkpoints": sorted(path.name for path in (path / "checkpoints").glob("step-*")),
            "result": json.loads(result.read_text()) if result.exists() else None,
            "weights": outcome(path).weights if list((path / "checkpoints").glob("step-*")) else None,
        }


MASKED: dict[str, Any] = {"document_mask": True, "sliding_window": 10}
AUTO: dict[str, Any] = {
    "batch_size": "auto",
    "global_batch_size": GLOBAL_BATCH,
    "gradient_accumulation_steps": 1,
}


def scenarios() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return, by name, what has to be left before ("": nothing) and the arguments of `Scenarios.start`."""
    all_of = {
        "one": ("", {"run": "one", "world": 1}),
        "ddp": ("", {"run": "ddp", "world": 2, "parallel": "ddp"}),
        "hybrid": ("", {"run": "hybrid", "world": 4, "parallel": "fsdp", "local_world": 2}),
        "exact one": ("", {"run": "exact-one", "world": 1, "elastic_exact": True}),
        "exact two": ("", {"run": "exact-two", "world": 2, "elastic_exact": True}),
        "auto": ("", {"run": "auto", "world": 2, "parallel": "ddp", "fault": _little_memory, **AUTO}),
        "auto fsdp": ("", {"run": "auto-fsdp", "world": 2, "parallel": "fsdp", **AUTO}),
        "infinite": ("", {"run": "infinite", "world": 2, "fault": infinite(1, 2), "steps": 3}),
        "deadline": ("", {"run": "deadline", "world": 2, "fault": _late, "max_time": "1h"}),
    }
    for preset in ("gemma3-tiny", "gpt2-10m"):
        half = {"preset": preset, "precision": "bf16", "steps": 2, "parallel": "fsdp"}
        for world in (1, 2):
            all_of[f"half {preset} {world}"] = "", {"run": f"half-{preset}-{world}", "world": world, **half}
    for parallel in ("ddp", "fsdp"):
        # In the second step, of which rank 1 does microbatches 3 and 4.
        stop = {"run": f"{parallel}-stop", "parallel": parallel}
        all_of[f"{parallel} stopped"] = "", {**stop, "world": 2, "fault": signalled(1, count=3)}
        all_of[f"{parallel} resumed on 1"] = f"{parallel} stopped", {**stop, "world": 1, "begins": 2}
    for name, world, more in (
        ("masked ddp", 1, {"elastic_exact": True, "parallel": "ddp"}),
        ("masked fsdp", 2, {"parallel": "fsdp"}),
    ):
        run, options = name.replace(" ", "-"), {**MASKED, **more}
        stop = {"run": f"{run}-stop", "world": 2, **options}
        all_of[name] = "", {"run": run, "world": world, **options}
        all_of[f"{name} stopped"] = "", {**stop, "fault": signalled(1, count=3)}
        all_of[f"{name} resumed"] = f"{name} stopped", stop
    oom_ddp = {"run": "oom-ddp", "world": 2, "microbatch": 8, "parallel": "ddp", "fault": _no_memory}
    all_of["oom ddp"] = "", oom_ddp
    before = ""
    for number, phase in enumerate(("forward", "backward", "update", "")):
        fault = oom(1, phase, count=2 * (number > 0) + 1) if phase else None
        oom_fsdp = {"run": "oom-fsdp", "world": 2, "microbatch": 8, "parallel": "fsdp", "fault": fault}
        all_of[f"oom fsdp {phase}"] = before, oom_fsdp
        before = f"oom fsdp {phase}"
    killed = {"run": "killed", "world": 2, "parallel": "ddp"}
    all_of["killed while meeting"] = "", {**killed, "fault": _gone}
    all_of["killed"] = "killed while meeting", {**killed, "fault": signalled(1, signal.SIGKILL, count=6)}
    all_of["killed, again"] = "killed", killed
    return all_of


def begin(shards: Path, folder: Path) -> Callable[[str], dict[str, Any]]:
    """Return what answers a scenario's name with what it left, and does it at the first time."""
    start, all_of = Scenarios(shards, folder).start, scenarios()
    left: dict[str, dict[str, Any]] = {}

    def answer(name: str) -> dict[str, Any]:
        if name not in left:
            before, arguments = all_of[name]
            if before:
                answer(before)
            left[name] = start(**arguments)
        return left[name]

    return answer


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
    # The step on tensors without data, which says where to begin, costs 5 s a rank; another test has it.
    microbatch.predicted_microbatch = lambda *given: given[3]
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
