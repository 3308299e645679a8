"""Damage: every file of a real checkpoint with a bit flipped, a byte cut off, or gone; and what resumes from there.

    python tests/faults/damage.py

A run of each family is trained and its newest checkpoint damaged in one place at a time. `newest` has to name that file
and pass over to the checkpoint before; every so often the run goes on and has to end as the undamaged one. The last
line printed is one JSON object.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from campaign import outcome
from common import Row, Tally, report, small_config, small_shards

from ekiden.checkpoint.manifest import read_manifest
from ekiden.checkpoint.store import CheckpointStore
from ekiden.training.loop import train

STEPS = 4
FLIPS = 12
"""Bits flipped in each file, drawn at random; the first and the last byte are always among them."""


def flip(path: Path, generator: random.Random, number: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    place = {0: 0, 1: len(data) - 1}.get(number, generator.randrange(len(data)))
    data[place] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def cut(path: Path, _generator: random.Random, _number: int) -> None:
    """Take the last byte away."""
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path, _generator: random.Random, _number: int) -> None:
    """Take the file away."""
    path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path, random.Random, int], None], int]] = {
    "one bit flipped": (flip, FLIPS),
    "one byte cut off": (cut, 1),
    "one file removed": (remove, 1),
}


def attack(preset: str, shards: Path, work: Path) -> list[Row]:
    """Damage every file of the newest checkpoint of a run in every way; return a row for each way."""
    run = work / preset
    config = small_config(preset, shards, run, STEPS)
    train(config)
    expected = outcome(run)
    names = sorted(path.name for path in max((run / "checkpoints").glob("step-*")).iterdir())
    before = read_manifest(run / f"checkpoints/step-{STEPS - 1:08d}")
    generator = random.Random(preset)
    rows = []
    for what, (damage, times) in DAMAGES.items():
        row = Tally(f"{what}, {preset}")
        for name in names:
            for number in range(times):
                trial = work / "trial"
                shutil.copytree(run, trial)
                damage(trial / f"checkpoints/step-{STEPS:08d}/{name}", generator, number)
                said = io.StringIO()
                with contextlib.redirect_stderr(said):
                    newest = CheckpointStore(trial / "checkpoints", keep=2).newest()
                named = f"step-{STEPS:08d} is damaged and was passed over" in said.getvalue()
                # A manifest that is gone, or whose bytes are others, is not said to hold a file.
                named &= name in said.getvalue() or name == "MANIFEST.json"
                row.tries += 1
                row.resumed += named and newest is not None and newest.step == STEPS - 1
                row.data_lost += newest is None
                if number == 0:  # the training is the slow part, and does not know what the damage was
                    with contextlib.redirect_stderr(io.StringIO()):
                        train(small_config(preset, shards, trial, STEPS))
                    row.bit_identical += outcome(trial) == expected
                else:
                    row.bit_identical += newest is not None and newest.manifest == before
                shutil.rmtree(trial)
        rows.append(asdict(row))
    return rows


def main() -> int:
    """Run it for both families."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        shards = small_shards(Path(name))
        for preset in ("gemma3-tiny", "gpt2-10m"):
            rows += attack(preset, shards, Path(name))
    passed = all(
        row["tries"] == row["resumed"] == row["bit_identical"] and not row["data_lost"] for row in rows
    )
    return report("damage", rows, passed)


if __name__ == "__main__":
    sys.exit(main())
