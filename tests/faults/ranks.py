"""Several ranks on one machine, forked from a process that has imported everything, and what can befall one of them.

    python tests/faults/ranks.py --kills 100      SIGKILL of a random rank at a random moment, resumed until done
    python tests/faults/ranks.py --matrix         {ddp, fsdp} x {save on a ranks, resume on b}, 1 to 4 each

Ranks meet over gloo on the loopback; each is a fresh process running `ekiden.train`. The last line printed is one JSON
object. `tests/distributed` runs short forms of the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from campaign import make_shards, outcome, settings

from ekiden.config import TrainConfig
from ekiden.errors import UserError
from ekiden.tokens.batches import Batches
from ekiden.training import step as step_module
from ekiden.training.history import read_history
from ekiden.training.loop import train

GLOBAL_BATCH = 8
BOUND_SECONDS = 60.0
"""Ranks that live longer than this after one was killed count as hanging; on an idle machine they end in 1 to 3 s."""
FROZEN_SECONDS = 3.0
"""Between two looks of this driver: longer, and it was itself stopped, with the ranks: no time that counts."""

Fault = Callable[[int], None]
"""Called in each rank with its number before it trains; may set hooks."""


@dataclass
class Ended:
    """How the ranks of one start ended.

    statuses: by rank, negative for a signal, None for one that hung. frozen_seconds: in which everything stood still.
    """

    statuses: list[int | None]
    seconds: float
    log: str
    killed: int | None = None
    seconds_after_kill: float = 0.0
    frozen_seconds: float = 0.0
    samples: dict[int, list[str]] = field(default_factory=dict)

    @property
    def completed(self) -> bool:
        """Whether every rank ended with status 0."""
        return all(status == 0 for status in self.statuses)


def options(world: int, **more: Any) -> dict[str, Any]:
    """Return settings under which `world` ranks begin a run of GLOBAL_BATCH samples a step."""
    assert GLOBAL_BATCH % world == 0 or "batch_size" in more
    return {
        "batch_size": 1,
        "gradient_accumulation_steps": GLOBAL_BATCH // world,
        "rank_timeout": "20s",
        "optimizer": "adamw",
        **more,
    }


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    config: TrainConfig,
    world: int,
    folder: Path,
    fault: Fault | None = None,
    kill: tuple[int, float] | None = None,
    local_world: int | None = None,
    limit_seconds: float = 240.0,
) -> Ended:
    """Train with `world` forked ranks; kill one of them by (rank, seconds) where asked.

    Args:
        folder: for the log and the record of samples.
        limit_seconds: of the whole start; what is left is killed, and counts as hanging.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    port, began = free_port(), time.monotonic()
    pids = [_fork(config, rank, world, local_world or world, port, folder, fault) for rank in range(world)]
    statuses: dict[int, int | None] = {}
    killed_at: float | None = None
    frozen, looked = 0.0, began
    while len(statuses) < world:
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - looked > FROZEN_SECONDS:
            frozen += time.monotonic() - looked
        looked = time.monotonic()
        now = looked - frozen
        if kill and killed_at is None and now - began >= kill[1]:
            if kill[0] not in statuses:
                os.kill(pids[kill[0]], signal.SIGKILL)
            killed_at = now
        late = killed_at is not None and now - killed_at > BOUND_SECONDS
        if late or now - began > limit_seconds:
            for rank, pid in enumerate(pids):
                if rank not in statuses:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    statuses[rank] = None
        time.sleep(0.01)
    ended = time.monotonic() - frozen
    return Ended(
        [statuses[rank] for rank in range(world)],
        ended - began,
        log.read_text(errors="replace") if log.exists() else "",
        kill[0] if killed_at is not None and kill else None,
        ended - killed_at if killed_at is not None else 0.0,
        frozen,
        _samples(folder, world),
    )


def _fork(
    config: TrainConfig, rank: int, world: int, local: int, port: int, folder: Path, fault: Fault | None
) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"})
        record_samples(folder / f"samples-{rank}")
        if fault:
            fault(rank)
        train(config)
        status = 0
    except UserError as error:
        if not getattr(error, "quiet", False):
            os.write(2, f"\nekiden: {error}\n".encode())
    except BaseException as error:
        os.write(2, f"\n{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def record_samples(path: Path) -> None:
    """Write a line for every step: its number, and a hash of every window that this rank is given for it."""
    real = Batches.microbatches

    def recorded(self: Batches, step: int, *arguments: Any, **more: Any) -> Iterator[Any]:
        rows = []
        for inputs, targets in real(self, step, *arguments, **more):
            for row in np.concatenate([inputs, targets[:, -1:]], axis=1):
                rows.append(hashlib.sha256(row.tobytes()).hexdigest()[:16])
            yield inputs, targets
        with path.open("a") as file:
            file.write(json.dumps([step, rows]) + "\n")

    Batches.microbatches = recorded  # type: ignore[method-assign]


def _samples(folder: Path, world: int) -> dict[int, list[str]]:
    """Return what all ranks were given, by step, in the order of ranks; a step done twice counts as it was last."""
    by_step: dict[int, list[str]] = {}
    for rank in range(world):
        path = folder / f"samples-{rank}"
        own = dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}
        for step, rows in own.items():
            by_step.setdefault(step, []).extend(rows)
        path.unlink(missing_ok=True)
    return by_step


# -- faults -----------------------------------------------------------------------------------------------------------


def at_microbatch(count: int, phase: str, action: Callable[[], None]) -> None:
    """Do `action` before the `count`-th forward or backward pass of this process, the trials not counted."""
    calls = 0

    def hook(index: int, now: str) -> None:
        nonlocal calls
        calls += index >= 0 and now == phase
        if index >= 0 and now == phase and calls == count:
            action()

    step_module.fault_hook = hook


def out_of_memory() -> None:
    """Fail as an allocator does."""
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


def oom(on_rank: int, phase: str, count: int = 9) -> Fault:
    """Return the fault that `on_rank` has no memory at one moment."""

    def set_up(rank: int) -> None:
        if rank != on_rank:
            return
        if phase != "update":
            at_microbatch(count, phase, out_of_memory)
            return
        calls = 0

        def hook() -> None:
            nonlocal calls
            calls += 1
            if calls == 2 + count:  # two trials before the first step
                out_of_memory()

        step_module.update_fault_hook = hook

    return set_up


def signalled(on_rank: int, number: signal.Signals = signal.SIGTERM, count: int = 9) -> Fault:
    """Return the fault that one rank alone is sent a signal."""
    return lambda rank: (
        at_microbatch(count, "forward", lambda: os.kill(os.getpid(), number)) if rank == on_rank else None
    )


def infinite(on_rank: int, at_step: int) -> Fault:
    """Return the fault that one rank's loss is infinite in one step."""

    def set_up(rank: int) -> None:
        real = step_module.accumulate_gradients
        calls = 0

        def poisoned(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            loss = real(*arguments, **more)
            calls += 1
            return loss * float("inf") if rank == on_rank and calls == at_step else loss

        from ekiden.training import stepping

        stepping.accumulate_gradients = poisoned  # type: ignore[attr-defined]

    return set_up


# -- the matrix -------------------------------------------------------------------------------------------------------


def losses(run: Path) -> dict[int, float]:
    """Return the training loss of every step."""
    return {r["step"]: r["loss"] for r in read_history(run / "history.jsonl") if r["kind"] == "train"}


def relative_difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """Return the largest relative difference of two runs' losses; infinite where one lacks a step."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(abs(found[step] - loss) / abs(loss) for step, loss in expected.items())


def pair(
    shards: Path,
    folder: Path,
    first: tuple[str, int],
    second: tuple[str, int],
    steps: int,
    preset: str,
    **more: Any,
) -> tuple[dict[int, float], dict[int, list[str]]]:
    """Train half of the steps on `first` = (parallel, ranks) and the rest on `second`; return losses and samples."""
    run = folder / "run"
    seen: dict[int, list[str]] = {}
    for number, (parallel, world) in enumerate((first, second)):
        # The global batch is that of a start on one rank, whoever begins.
        config = settings(
            preset, shards, run, steps, **{**matrix_options(first[1]), "parallel": parallel, **more}
        )
        fault = signalled(0, count=1 + (steps // 2 - 1) * _per_step(world)) if number == 0 else None
        done = run_ranks(config, world, folder / f"start-{number}", fault)
        if not done.completed:
            raise AssertionError(f"{first} -> {second}: {done.statuses}\n{done.log[-3000:]}")
        seen |= done.samples
    return losses(run), seen


MATRIX_BATCH = 12
"""Divided by 1, 2, 3 and 4."""


def matrix_options(world: int) -> dict[str, Any]:
    """Return settings for the matrix: the same global batch whoever begins."""
    return {
        "batch_size": 1,
        "gradient_accumulation_steps": MATRIX_BATCH // world,
        "save_steps": 0,
        "eval_steps": 0,
        "rank_timeout": "20s",
    }


def _per_step(world: int) -> int:
    return MATRIX_BATCH // world


def matrix(
    preset: str, shards: Path, folder: Path, steps: int, optimizer: str = "muon"
) -> list[dict[str, Any]]:
    """Return a row for each pair: parallel, ranks before and after, the largest relative difference of a loss."""
    one = settings(
        preset, shards, folder / "reference" / "run", steps, **matrix_options(1), optimizer=optimizer
    )
    done = run_ranks(one, 1, folder / "reference")
    assert done.completed, done.log
    expected, expected_samples = losses(folder / "reference" / "run"), done.samples
    rows = []
    for parallel in ("ddp", "fsdp"):
        for before in (1, 2, 3, 4):
            for after in (1, 2, 3, 4):
                place = folder / f"{parallel}-{before}-{after}"
                found, samples = pair(
                    shards, place, (parallel, before), (parallel, after), steps, preset, optimizer=optimizer
                )
                rows.append(
                    {
                        "parallel": parallel,
                        "before": before,
                        "after": after,
                        "difference": relative_difference(found, expected),
                        "same_samples": samples == expected_samples,
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def exact(preset: str, shards: Path, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Return a row for each pair of 1, 2 and 4 ranks under `--elastic-exact`: whether every bit is the same."""
    rows = []
    expected: Any = None
    for before, after in ((1, 1), (2, 2), (4, 4), (4, 1), (1, 2), (2, 4)):
        place = folder / f"exact-{before}-{after}"
        run = place / "run"
        for number, world in enumerate((before, after)):
            # 8 microbatches of 1 sample.
            more = {**options(before), "save_steps": 0, "eval_steps": 0, "elastic_exact": True}
            config = settings(preset, shards, run, steps, **more)
            fault = signalled(0, count=1 + (steps // 2 - 1) * GLOBAL_BATCH // world) if number == 0 else None
            done = run_ranks(config, world, place / f"start-{number}", fault)
            if not done.completed:
                raise AssertionError(f"exact {before} -> {after}: {done.statuses}\n{done.log[-3000:]}")
        found = outcome(run)
        expected = expected or found
        rows.append({"before": before, "after": after, "bit_identical": found == expected})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


# -- kills ------------------------------------------------------------------------------------------------------------


def count_kill(done: Ended, parallel: str, tally: dict[str, Any]) -> None:
    """Count one kill, and how the other ranks ended."""
    assert done.killed is not None
    if done.frozen_seconds:
        # The whole machine stood still during this one: it is resumed, but counts for nothing.
        tally["frozen"] += 1
        return
    tally["kills"] += 1
    tally["by_parallel"][parallel] += 1
    tally["hung"] += None in done.statuses
    told = f"rank {done.killed} (process" in done.log or "could not meet" in done.log
    survived = [status for rank, status in enumerate(done.statuses) if rank != done.killed]
    if any(survived) and not told:
        tally["without_a_sentence"] += 1
        print(done.statuses, done.log[-2000:], file=sys.stderr)
    tally["slowest_end_seconds"] = max(tally["slowest_end_seconds"], round(done.seconds_after_kill, 1))


def kills(
    shards: Path,
    folder: Path,
    count: int,
    seed: int,
    world: int = 2,
    steps: int = 12,
    optimizer: str = "muon",
) -> dict[str, Any]:
    """Kill a random rank at a random moment, `count` times; resume each run to its end; compare with an unkilled one."""
    generator = random.Random(seed)

    def start(name: str, kill: tuple[int, float] | None, parallel: str, attempt: int = 0) -> Ended:
        batch = {"batch_size": 2, "gradient_accumulation_steps": 2}
        more = options(world, parallel=parallel, save_steps=3, eval_steps=0, optimizer=optimizer, **batch)
        config = settings("gemma3-tiny", shards, folder / name, steps, **more)
        return run_ranks(config, world, folder / f"{name}-log-{attempt}", kill=kill)

    expected, seconds = {}, {}
    for parallel in ("ddp", "fsdp"):
        reference = start(f"reference-{parallel}", None, parallel)
        assert reference.completed, reference.log
        expected[parallel], seconds[parallel] = outcome(folder / f"reference-{parallel}"), reference.seconds
    tally: dict[str, Any] = {
        "kills": 0,
        "by_parallel": {"ddp": 0, "fsdp": 0},
        "frozen": 0,
        "hung": 0,
        "not_resumed": 0,
        "different": 0,
        "without_a_sentence": 0,
        "slowest_end_seconds": 0.0,
    }
    number = 0
    while tally["kills"] < count:
        parallel = ("ddp", "fsdp")[number % 2]
        name, number = f"run-{number}", number + 1
        for attempt in range(20):
            aim = (generator.randrange(world), generator.uniform(0.3, 1.0) * seconds[parallel])
            kill = aim if tally["kills"] < count and attempt < 6 else None
            done = start(name, kill, parallel, attempt)
            if done.completed:
                break
            if done.killed is None or done.statuses[done.killed] != -signal.SIGKILL:
                tally["not_resumed"] += 1
                print(done.statuses, done.log[-2000:], file=sys.stderr)
                break
            count_kill(done, parallel, tally)
        else:
            tally["not_resumed"] += 1
        if done.completed:
            found = outcome(folder / name)
            tally["different"] += found != expected[parallel]
        print(json.dumps(tally), file=sys.stderr, flush=True)
    tally["passed"] = not (
        tally["hung"] or tally["not_resumed"] or tally["different"] or tally["without_a_sentence"]
    )
    return tally


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--steps", type=int, default=8, help="of each run of the matrix")
    parser.add_argument("--preset", default="gemma3-tiny")
    parser.add_argument("--optimizer", default="muon", help="muon or adamw")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result: dict[str, Any] = {"campaign": "ranks", "optimizer": given.optimizer}
    with tempfile.TemporaryDirectory() as name:
        with contextlib.redirect_stdout(sys.stderr):
            shards = make_shards(Path(name))
        if given.matrix:
            rows = matrix(given.preset, shards, Path(name) / "matrix", given.steps, given.optimizer)
            largest = {
                parallel: max(row["difference"] for row in rows if row["parallel"] == parallel)
                for parallel in ("ddp", "fsdp")
            }
            result |= {"matrix": rows, "largest_difference": largest}
            result["same_samples"] = all(row["same_samples"] for row in rows)
        if given.matrix or given.exact:
            result["exact"] = exact(given.preset, shards, Path(name) / "exact", given.steps)
        if given.kills:
            result["kills"] = kills(
                shards, Path(name) / "kills", given.kills, given.seed, optimizer=given.optimizer
            )
    passed = result.get("same_samples", True) and result.get("kills", {}).get("passed", True)
    passed = passed and all(row["bit_identical"] for row in result.get("exact", []))
    print(json.dumps({**result, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
