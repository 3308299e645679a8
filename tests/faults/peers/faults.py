"""The drivers: the same kills, full disks and flipped bits for every system, each returning one row of figures.

What was acknowledged, and the hash of every state that was ever reached, are kept in this process, outside the folder
under attack. A state counts as wrong where its hash is none that this run had at that step.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers.systems import System
from peers.trial import Session, Trial, run_trial

Row = dict[str, Any]
SAVES_BEFORE_FULL, STEPS_WHILE_FULL, STEPS_AFTER = 4, 4, 3
PATIENCE = 25


class Ledger:
    """What a run is known to have done: the newest acknowledged step, and the states by step."""

    def __init__(self) -> None:
        self.acknowledged = 0
        self.states: dict[int, set[str]] = defaultdict(set)
        self.repeated = self.identical = 0

    def add(self, trial: Trial) -> None:
        """Take in what a process told."""
        self._keep(trial.of("resumed")[:1] if not self.states[0] else [])
        for event in trial.of("stepped"):
            seen = self.states[event["step"]]
            self.repeated += bool(seen)
            self.identical += event["digest"] in seen
            self._keep([event])
        for event in trial.of("saved"):
            self.acknowledged = event["step"]

    def _keep(self, events: list[Row]) -> None:
        for event in events:
            self.states[event["step"]].add(event["digest"])

    def wrong(self, resumed: Row) -> bool:
        """Return whether a state taken up is none that the run had at that step."""
        return bool(self.states[resumed["step"]]) and resumed["digest"] not in self.states[resumed["step"]]


class Driver:
    """Runs processes of one system in folders of its own.

    Args:
        work: a folder for runs and logs. shards: token shards for Ekiden.
    """

    def __init__(self, system: System, work: Path, shards: Path) -> None:
        self.system, self.work, self.shards = system, work, shards
        self.log = work / "log"

    def run(self, folder: Path, kill_after: float | None = None, **session: Any) -> Trial:
        """Run the command once in `folder`."""
        return run_trial(
            self.system.train,
            Session(folder, self.shards, **session),
            self.log,
            kill_after,
            self.system.environment,
        )

    def resume_with_help(self, folder: Path, tries: int = 6) -> Trial:
        """Do what a person has to do until the command goes on; return the process that did."""
        for _ in range(tries):
            self.system.repair(folder)
            trial = self.run(folder, resume_only=True)
            if trial.resumed:
                return trial
        raise RuntimeError(f"{self.system.name} in {folder} goes on from nothing: {trial.problem}")


CALIBRATION_SAVES = 8


def kill(driver: Driver, kills: int, seed: int, every: int) -> Row:
    """End processes by SIGKILL, each at a random moment of its first ten saves, and start each again.

    Args:
        every: steps from save to save.

    Returns:
        kills; how many fell into a save; resumes that failed and needed a human; resumes that silently went on from an
        older step than acknowledged; steps lost by either; wrong states; repeated steps and those bit-identical.
    """
    generator = random.Random(f"{seed} {driver.system.name} kill {every}")
    window = 10 * seconds_of_a_save(driver, every)
    folder = driver.work / "kill"
    folder.mkdir()
    ledger = Ledger()
    row: Row = {"save_every": every, "seconds_per_save": round(window / 10, 3)}
    row |= dict.fromkeys(
        ("kills", "in_save", "needed_human", "silently_older", "steps_lost", "worst_loss", "wrong"), 0
    )
    problems: set[str] = set()
    while row["kills"] < kills:
        trial = driver.run(folder, generator.uniform(0, window), every=every)
        after_kill(row, ledger, driver, folder, trial, problems)
        if trial.status is None:
            ledger.add(trial)
            row["kills"] += 1
            row["in_save"] += trial.in_save
    after_kill(row, ledger, driver, folder, driver.run(folder, resume_only=True), problems)
    shutil.rmtree(folder)
    return row | {"repeated": ledger.repeated, "identical": ledger.identical, "problems": sorted(problems)}


def seconds_of_a_save(driver: Driver, every: int) -> float:
    """Return how long the steps up to a save and the save take, undisturbed."""
    folder = driver.work / "calibration"
    folder.mkdir()
    start = driver.run(folder, resume_only=True, every=every).seconds
    whole = driver.run(folder, last_step=CALIBRATION_SAVES * every, every=every).seconds
    shutil.rmtree(folder)
    return max(whole - start, 0.01) / CALIBRATION_SAVES


def after_kill(
    row: Row, ledger: Ledger, driver: Driver, folder: Path, trial: Trial, problems: set[str]
) -> None:
    """Judge where a process went on; where it did not, do what a person has to do."""
    if trial.resumed:
        judge_resume(row, ledger, trial.resumed, by_itself=True)
        return
    problems.add(trial.problem)
    row["needed_human"] += 1
    again = driver.resume_with_help(folder)
    assert again.resumed
    judge_resume(row, ledger, again.resumed, by_itself=False)


def judge_resume(row: Row, ledger: Ledger, resumed: Row, by_itself: bool) -> None:
    """Count what a resume lost against what was acknowledged."""
    lost = max(0, ledger.acknowledged - resumed["step"])
    row["steps_lost"] += lost
    row["worst_loss"] = max(row["worst_loss"], lost)
    row["silently_older"] += lost > 0 and by_itself
    row["wrong"] += ledger.wrong(resumed)
    # What is gone was counted once.
    ledger.acknowledged = min(ledger.acknowledged, resumed["step"])


def kill_in_write(driver: Driver, tenths_of_file: list[int]) -> Row:
    """End processes in the middle of a write, the same every time: when a file reaches so many tenths of the size
    that the largest file of a save has, the kernel ends the process (RLIMIT_FSIZE)."""
    row: Row = dict.fromkeys(
        ("kills", "in_save", "needed_human", "silently_older", "steps_lost", "worst_loss", "wrong"), 0
    )
    problems: set[str] = set()
    for tenths in tenths_of_file:
        folder = driver.work / "kill-in-write"
        folder.mkdir()
        ledger = Ledger()
        ledger.add(driver.run(folder, last_step=3))
        largest = max(path.stat().st_size for path in driver.system.newest_files(folder).values())
        limit = largest * tenths // 10

        def at_step(done: int, limit: int = limit) -> None:
            if done == 2:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        trial = driver.run(folder, last_step=20, at_step=at_step)
        assert trial.status is None, f"no file of {driver.system.name} reached {limit} bytes"
        ledger.add(trial)
        row["kills"] += 1
        row["in_save"] += trial.in_save
        after_kill(row, ledger, driver, folder, driver.run(folder, resume_only=True), problems)
        shutil.rmtree(folder)
    return row | {"problems": sorted(problems)}


# -- full disk -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(work: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """Mount a file system of that size: "tmpfs", or "ext4" in an image; needs root.

    Raises:
        CalledProcessError: it cannot be mounted.
    """
    mountpoint = work / "disk"
    mountpoint.mkdir(exist_ok=True)
    image = work / "disk.img"
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(mountpoint)]
    else:
        image.write_bytes(b"")
        os.truncate(image, megabytes << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(mountpoint)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", str(mountpoint)], check=True)
        image.unlink(missing_ok=True)


def full_disk(driver: Driver, tries: int, seed: int, kind: str, greedy: bool, megabytes: int = 160) -> Row:
    """After some saves, let somebody else's file take the disk; some steps later, take that file away.

    Args:
        greedy: the file takes whatever becomes free, at once; else it leaves a random part of one save and stays so.

    Returns:
        tries; runs that went on; runs that died, and of these the ones that the same command could not resume once
        there was space; saves that succeeded while the disk was full; resumes that silently went on from an older step
        than acknowledged; steps lost; wrong states.
    """
    generator = random.Random(f"{seed} {driver.system.name} full disk {kind} {greedy}")
    row: Row = {
        "disk": f"{kind}, {'all that becomes free is taken' if greedy else 'part of a save is left'}",
        "tries": 0,
    }
    row |= dict.fromkeys(
        (
            "went_on",
            "died",
            "saved_while_full",
            "needed_human",
            "silently_older",
            "steps_lost",
            "worst_loss",
            "wrong",
        ),
        0,
    )
    problems: set[str] = set()
    save_bytes = 0
    for number in range(tries):
        with small_disk(driver.work, kind, megabytes) as disk:
            run, file = disk / "run", disk / "somebody-elses-file"
            run.mkdir()
            if not save_bytes:
                save_bytes = size_of_a_save(driver, run)
                continue_from_nothing(run)
            left = int(generator.uniform(0.02, 0.98) * save_bytes)
            one_full_disk(driver, run, Neighbour(file, left, greedy), row, problems)
        row["tries"] = number + 1
    return row | {"problems": sorted(problems)}


class Neighbour:
    """Somebody else's file, which grows: to all but `left` bytes of the disk, or, where greedy, for as long as it may."""

    def __init__(self, file: Path, left: int, greedy: bool) -> None:
        self.file, self.left, self.greedy = file, left, greedy
        self._process = 0

    def grow(self) -> None:
        """Take the disk."""
        fill(self.file, 0 if self.greedy else self.left)
        if not self.greedy:
            return
        parent = os.getpid()
        self._process = os.fork()
        if self._process == 0:
            os.closerange(3, 1024)  # or the pipe of the process that forked it stays open
            while os.getppid() == parent:
                fill(self.file, 0)
            os._exit(0)

    def go(self) -> None:
        """Give the disk back."""
        if self._process:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        self.file.unlink(missing_ok=True)


def size_of_a_save(driver: Driver, run: Path) -> int:
    """Return the bytes that the files of the newest state take."""
    driver.run(run, last_step=2)
    return sum(path.stat().st_size for path in driver.system.newest_files(run).values())


def continue_from_nothing(run: Path) -> None:
    """Empty the folder of a run."""
    shutil.rmtree(run)
    run.mkdir()


def one_full_disk(driver: Driver, run: Path, neighbour: Neighbour, row: Row, problems: set[str]) -> None:
    """One try: fill, go on for some steps, free, go on; then the same command once more."""
    ledger = Ledger()
    full_until = SAVES_BEFORE_FULL + STEPS_WHILE_FULL

    def at_step(done: int) -> None:
        if done == SAVES_BEFORE_FULL + 1:
            neighbour.grow()
        elif done == full_until + 1:
            neighbour.go()

    trial = driver.run(run, last_step=full_until + STEPS_AFTER, at_step=at_step, patience=PATIENCE)
    ledger.add(trial)
    died = trial.status != 0
    row["went_on"] += not died
    row["died"] += died
    row["saved_while_full"] += sum(
        SAVES_BEFORE_FULL < event["step"] <= full_until for event in trial.of("saved")
    )
    if died:
        problems.add(trial.problem)
    time.sleep(0.05 if neighbour.greedy else 0)  # it ends when it sees that its parent is gone
    neighbour.file.unlink(missing_ok=True)
    after_kill(row, ledger, driver, run, driver.run(run, resume_only=True), problems)


def fill(path: Path, left: int) -> None:
    """Append to a file until about `left` bytes of its disk are free, or none."""
    with path.open("ab", buffering=0) as file:
        free = os.statvfs(path.parent)
        remaining = free.f_bavail * free.f_frsize - left
        block = bytes(1 << 20)
        with contextlib.suppress(OSError):  # ENOSPC: the metadata of a file system takes space too
            while remaining > 0:
                remaining -= file.write(block[:remaining])


# -- flipped bits ----------------------------------------------------------------------------------------------


def bit_flip(driver: Driver, flips: int, seed: int) -> list[Row]:
    """Flip one random bit in the newest state, and start the command again; for each kind of file.

    Returns:
        For each: tries; found and an older state used; found, but the command refuses; silently wrong; harmless.
    """
    generator = random.Random(f"{seed} {driver.system.name} bit flip")
    pristine = driver.work / "pristine"
    pristine.mkdir()
    ledger = Ledger()
    ledger.add(driver.run(pristine, last_step=3))
    kinds = driver.system.newest_files(pristine)
    rows = []
    for kind, path in kinds.items():
        tries = flips * 2 // len(kinds)
        row: Row = {"file": f"{path.name} ({kind})", "bytes": path.stat().st_size, "tries": tries}
        row |= dict.fromkeys(("found_and_older_used", "found_and_refused", "silently_wrong", "harmless"), 0)
        for _ in range(tries):
            attacked = driver.work / "attacked"
            shutil.copytree(pristine, attacked, symlinks=True)
            flip_bit(attacked / path.relative_to(pristine), generator)
            row[outcome(driver.run(attacked, resume_only=True), ledger)] += 1
            shutil.rmtree(attacked)
        rows.append(row)
    shutil.rmtree(pristine)
    return rows


def flip_bit(path: Path, generator: random.Random) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def outcome(trial: Trial, ledger: Ledger) -> str:
    """Return the column that a resume after damage belongs to."""
    if not trial.resumed:
        return "found_and_refused"
    if trial.resumed["digest"] not in ledger.states[trial.resumed["step"]]:
        return "silently_wrong"
    return "harmless" if trial.resumed["step"] == ledger.acknowledged else "found_and_older_used"
