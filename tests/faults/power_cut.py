"""Power cuts: a process saves on a disk of which a picture is taken while it runs; every save that it reported is in it.

    python tests/faults/power_cut.py [--tries 20] [--mount default|noauto_da_alloc]

The picture (`disk`) is mounted elsewhere, which replays its journal, and what is there is held against the last step
that had been acknowledged, outside the disk, at the instant of the picture. Half of the pictures are taken after a
random time, half after a random number of writes, which falls amid a save; the drive's cache keeps all, nothing or a
random part of what was not flushed. The next writer goes on from what the last picture left. A control, `torch.save`
without an fsync, has to fail, or the campaign does. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import Row, Tally, content, report, save, small_config, small_shards, work_folder
from disk import CACHES, Disk, Picture, blank, consistent, mounted, why_not

from ekiden.checkpoint.store import CheckpointStore
from ekiden.errors import UserError
from ekiden.training.history import read_history
from ekiden.training.loop import train

MOUNTS = {"default": "", "noauto_da_alloc": "noauto_da_alloc"}
CUTS_A_SESSION = 4
KEEP = 2
PATIENCE = 300.0
"""Seconds in which a writer has to acknowledge its first save; imports of torch take most of them."""


@dataclass(frozen=True)
class Found:
    """What is there after a power cut. step: of the newest state that loads, None without one; problem: what is wrong."""

    step: int | None
    problem: str = ""


Verify = Callable[[Path], Found]


@dataclass(frozen=True)
class Cut:
    """One power cut. acknowledged: the last step reported before it; clean: the file system itself needs no repair."""

    picture: Picture
    cache: str
    acknowledged: int
    found: Found
    clean: bool

    @property
    def lost(self) -> bool:
        """Whether an acknowledged save is not there."""
        return (self.found.step or 0) < self.acknowledged


def run_power_cut(
    writer: list[str],
    verify: Verify,
    tries: int,
    mount_options: str = "",
    seed: int = 0,
    megabytes: int = 64,
) -> Iterator[Cut]:
    """Cut the power of a writer `tries` times.

    Args:
        writer: a command; "{folder}" in it is where it saves. It goes on from what is there, and prints the number
            of each step, on a line of its own and flushed, once that step's save has returned.
        verify: looks at such a folder after a cut. What it repairs is what the next writer finds.
        mount_options: of ext4, for both mounts. seed: for moments and caches. megabytes: size of the disk.
    """
    generator, caches = random.Random(seed), itertools.cycle(CACHES)
    with tempfile.TemporaryDirectory(dir=work_folder()) as name:
        work, left = Path(name), tries
        image = fresh = blank(work, megabytes)
        while left:
            with Disk(work, image, mount_options) as disk, _running(writer, disk, work / "log") as process:
                _wait_for_a_save(disk, process, work)
                cuts = []
                for number in range(min(left, CUTS_A_SESSION)):
                    cache, path = next(caches), work / f"picture-{number}"
                    time.sleep(generator.uniform(0, 0.7))
                    writes = generator.randrange(1, 60) if number % 2 else 0
                    picture = disk.picture(path, cache, generator.randrange(1 << 30), writes)
                    cuts.append((path, cache, picture))
            for path, cache, picture in cuts:
                yield _look(path, cache, picture, verify, work, mount_options)
                left -= 1
            # A protocol that does not survive would leave nothing to go on from.
            image = path if verify_again(path, verify, work) else fresh


def verify_again(path: Path, verify: Verify, work: Path) -> bool:
    """Return whether there is a state in an image to go on from."""
    with mounted(path, work / "seen") as folder:
        found = verify(folder)
        return found.step is not None and not found.problem


@contextlib.contextmanager
def _running(writer: list[str], disk: Disk, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [word.replace("{folder}", str(disk.folder)) for word in writer]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stdout=disk.acknowledge, stderr=stderr) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _wait_for_a_save(disk: Disk, process: subprocess.Popen[bytes], work: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not disk.picture(work / "picture-0", CACHES[0], 0).said:
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the writer saved nothing: {(work / 'log').read_text()[-2000:]}")
        time.sleep(0.5)


def _look(path: Path, cache: str, picture: Picture, verify: Verify, work: Path, options: str) -> Cut:
    """Mount a picture as a machine would that starts again, and look at it."""
    with mounted(path, work / "seen", options) as folder:
        found = verify(folder)
    return Cut(picture, cache, int(picture.said), found, consistent(path))


# -- writers and what has to be there ---------------------------------------------------------------------------------


def acknowledge(step: int) -> None:
    """Tell, outside the disk, that the save of a step has returned."""
    os.write(1, f"{step}\n".encode())


def write_store(folder: Path) -> None:
    """Save through the store as fast as it goes, 64 kB of weights a step."""
    newest = CheckpointStore(folder / "checkpoints", KEEP).newest()
    for step in itertools.count(newest.step + 1 if newest else 1):
        save(folder / "checkpoints", step, KEEP, 64)
        acknowledge(step)


def verify_store(folder: Path) -> Found:
    """Open the store as a resume does; hold the bytes of the newest checkpoint against what that step saves."""
    try:
        newest = CheckpointStore(folder / "checkpoints", KEEP).newest()
    except UserError as error:
        return Found(None, str(error))
    if newest is None:
        return Found(None)
    with tempfile.TemporaryDirectory(dir=work_folder()) as name:
        expected = content(save(Path(name), newest.step, KEEP, 64).path)
    names = [path.name for path in newest.path.parent.iterdir() if path.name[0] == "."]
    problems = [f"{names} beside it"] if names else []
    problems += ["other bytes than were saved"] if content(newest.path) != expected else []
    return Found(newest.step, "; ".join(problems))


def write_trainer(folder: Path, shards: Path) -> None:
    """Train a small model that saves at every step."""
    real = CheckpointStore.save

    def told(self: CheckpointStore, step: int, *args: Any, **more: Any) -> Any:
        checkpoint = real(self, step, *args, **more)
        acknowledge(step)
        return checkpoint

    CheckpointStore.save = told  # type: ignore[method-assign]
    train(small_config("gpt2-10m", shards, folder / "run", 5000))


def verify_trainer(folder: Path) -> Found:
    """Look at the checkpoint, and at the history up to its step, and at the settings."""
    run = folder / "run"
    try:
        newest = CheckpointStore(run / "checkpoints", KEEP).newest()
    except UserError as error:
        return Found(None, str(error))
    if newest is None:
        return Found(None)
    seen = [r["step"] for r in read_history(run / "history.jsonl") if r["kind"] == "train"]
    steps = {step for step in seen if step <= newest.step}
    problems = []
    if len(steps) < newest.step:
        problems.append(f"{newest.step - len(steps)} of {newest.step} steps are not in the history")
    if yaml.safe_load((run / "config.yaml").read_text())["max_steps"] != 5000:
        problems.append("config.yaml is not the run's")
    if not all(torch.isfinite(w).all() for w in newest.tensors("model.safetensors").values()):
        problems.append("weights are not finite")
    return Found(newest.step, "; ".join(problems))


def write_unsynced(folder: Path) -> None:
    """Save as most scripts do: `torch.save` to a new file, the older ones removed, nothing synced."""
    for step in itertools.count(1):
        torch.save({"step": step, "weight": torch.full((1 << 14,), float(step))}, folder / f"{step:06d}.pt")
        (folder / f"{step - KEEP:06d}.pt").unlink(missing_ok=True)
        acknowledge(step)
        time.sleep(0.02)


def verify_unsynced(folder: Path) -> Found:
    """Load the newest file that loads."""
    for path in sorted(folder.glob("*.pt"), reverse=True):
        with contextlib.suppress(Exception):
            return Found(int(torch.load(path, weights_only=True)["step"]))
    return Found(None)


WRITERS: dict[str, tuple[Callable[..., None], Verify]] = {
    "the store": (write_store, verify_store),
    "the trainer": (write_trainer, verify_trainer),
    "torch.save": (write_unsynced, verify_unsynced),
}


# -- the program ------------------------------------------------------------------------------------------------------


@dataclass
class PowerCuts(Tally):
    """A row; unflushed: tries in which the disk held writes that were not flushed yet; repairs: file systems damaged."""

    unflushed: int = 0
    repairs: int = 0

    def add(self, cut: Cut) -> None:
        """Count one power cut."""
        self.tries += 1
        self.resumed += cut.found.step is not None
        self.bit_identical += cut.found.step is not None and not cut.found.problem
        self.data_lost += cut.lost
        self.unflushed += cut.picture.unflushed > 0
        self.repairs += not cut.clean


def campaign(name: str, mount: str, tries: int, seed: int, extra: list[str]) -> PowerCuts:
    """Cut the power of one of `WRITERS`; return its row."""
    title = f"power cut, {name}, ext4 {mount}" + (" (control: has to lose)" if name == "torch.save" else "")
    row = PowerCuts(title)
    command = [sys.executable, str(Path(__file__)), "--writer", name, "{folder}", *extra]
    for cut in run_power_cut(command, WRITERS[name][1], tries, MOUNTS[mount], seed):
        row.add(cut)
        print(f"{mount}, {name}: {cut}", file=sys.stderr, flush=True)
    return row


def main() -> int:
    """Run the campaign, or one of its writers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=20, help="for each way of mounting")
    parser.add_argument("--mount", choices=MOUNTS, help="only this one")
    parser.add_argument("--only", choices=WRITERS, help="only this writer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writer", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.writer:
        WRITERS[options.writer[0]][0](*map(Path, options.writer[1:]))
        return 0
    if reason := why_not():
        return report("power_cut", [], True, skipped=reason)
    rows: list[Row] = []
    passed = True
    names = [options.only] if options.only else list(WRITERS)
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        shards = [str(small_shards(Path(work)))] if "the trainer" in names else []
        for mount in [options.mount] if options.mount else MOUNTS:
            for name in names:
                tries = min(options.tries, 8) if name == "torch.save" else options.tries
                row = campaign(name, mount, tries, options.seed, shards if name == "the trainer" else [])
                rows.append(asdict(row))
                passed &= row.data_lost > 0 if name == "torch.save" else row.whole and row.repairs == 0
    return report("power_cut", rows, passed, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
