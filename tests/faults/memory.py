"""Runs on a CPU whose address space is cut (RLIMIT_AS), before the first step or amid training.

    python tests/faults/memory.py

Each trial is a forked process that may allocate so many megabytes more than it holds. It has to finish with a smaller
microbatch and the losses of an unlimited run (within float summation), or to end with the sentence that says what to
lower. The last line printed is one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from campaign import make_shards, outcome, settings, trial, whole

from ekiden.training import step as step_module
from ekiden.training.history import read_history

SHAPE = {"max_length": 128, "batch_size": 64, "sliding_window": 64, "save_steps": 2, "loss_chunk_size": 4096}
"""Activations of 64 samples are some 200 MB, those of one sample a few."""
STEPS = 3


def limit(megabytes: int) -> list[torch.Tensor]:
    """Leave this process so much memory and no more; what it returns has to be kept.

    A limit of the address space alone does not bite: the heap has kept what the steps before have freed. So all there
    is is taken, and a block of so much given back.
    """
    given_back = [torch.empty(megabytes * 1_000_000, dtype=torch.uint8)]
    most = psutil.Process().memory_info().vms + 500_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    ballast: list[torch.Tensor] = []
    with contextlib.suppress(RuntimeError):
        while True:
            ballast.append(torch.empty(1_000_000, dtype=torch.uint8))
    given_back.clear()
    return ballast


def limiter(megabytes: int, amid_training: bool) -> Callable[[], None]:
    """Return what limits a process's memory from the trial step, or from the second step, on."""
    begun = 0
    kept: list[list[torch.Tensor]] = []

    def hook(index: int, phase: str) -> None:
        nonlocal begun
        begun += phase == "forward" and index == (0 if amid_training else -2)
        if begun == (2 if amid_training else 1):
            begun += 1000
            kept.append(limit(megabytes))

    def setup() -> None:
        step_module.fault_hook = hook

    return setup


def sweep(
    shards: Path, folder: Path, megabytes: list[int], amid_training: bool, auto: bool = False
) -> dict[str, Any]:
    """Return the table's row for these limits, with what became of each; `auto`: the microbatch is to be found."""
    reference = folder / "reference"
    if not reference.exists():
        config = settings("gemma3-tiny", shards, reference, STEPS, **SHAPE)
        assert trial(config, folder / "log").status == 0, (folder / "log").read_text()
    expected = outcome(reference).losses
    when = "in training" if amid_training else "before the first step"
    shape = {**SHAPE, "batch_size": "auto", "global_batch_size": SHAPE["batch_size"]} if auto else SHAPE
    row: dict[str, Any] = {
        "fault": f"memory limit {when}{', automatic microbatch' if auto else ''}",
        "tries": 0,
        "resumed": 0,
        "bit_identical": 0,
        "data_lost": 0,
    }
    row["found"] = {}
    for size in megabytes:
        run = folder / f"{size}-{amid_training}-{auto}"
        log = folder / f"{run.name}.log"
        config = settings("gemma3-tiny", shards, run, STEPS, **shape)
        done = trial(config, log, setup=limiter(size, amid_training))
        row["tries"] += 1
        events = [r for r in read_history(run / "history.jsonl") if r.get("event") in ("oom", "microbatch")]
        smallest = SHAPE["batch_size"]
        for event in events:
            smallest = event["microbatch"][1] if event["event"] == "oom" else event["samples"]
        if done.status == 0:
            losses = outcome(run).losses
            close = all(abs(losses[step] - loss) < 1e-4 for step, loss in expected.items())
            row["resumed"] += losses.keys() == expected.keys()
            row["bit_identical"] += close
            row["found"][size] = smallest
        else:
            sentence = log.read_text().rpartition("UserError: ")[2].strip()
            said = "lower --max-length" in sentence
            row["resumed"] += said
            row["bit_identical"] += said
            row["found"][size] = sentence if said else log.read_text()[-300:]
    return row


def main() -> None:
    """Sweep the limits and print what became of each."""
    with tempfile.TemporaryDirectory() as name:
        shards = make_shards(Path(name))
        sizes = [1, 2, 5, 10, 20, 40, 60, 80, 120, 160, 200]
        rows = [sweep(shards, Path(name), sizes, amid_training) for amid_training in (False, True)]
    for row in rows:
        print(f"{row['fault']}: microbatch found for each limit in MB: {row['found']}")
    passed = all(whole(row) for row in rows)
    print(json.dumps({"campaign": "memory", "rows": rows, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
