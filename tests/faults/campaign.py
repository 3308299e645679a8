"""The kill campaign: runs ended by SIGKILL, at random moments and aimed at the file operations of
saves, renames, deletions, loads and the mirror's upload, and resumed until done, against an uninterrupted one.

    python tests/faults/campaign.py --kills 100 --preset gemma3-tiny

Every trial is a fresh process running `ekiden.train`, forked from one that has imported everything (an import of
torch costs more than a trial). What a trial must leave, and the expected result, are kept outside the run directory.
Every run has a mirror; after half of the kills in an upload the run directory is gone, as with the machine.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import Forked

from ekiden.checkpoint import files
from ekiden.checkpoint.manifest import read_manifest
from ekiden.checkpoint.mirror import open_mirror
from ekiden.config import TrainConfig, build_config
from ekiden.quickstart import standard_library_prose
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens.build import preprocess
from ekiden.training.history import read_history
from ekiden.training.loop import train

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "sliding_window": 16,
    "max_length": 32,
    "batch_size": 4,
}


@dataclass
class Outcome:
    """What a run left: losses by step as they stand in the history (every step once), hashes of the final files."""

    losses: dict[int, float]
    steps_twice: int
    weights: dict[str, str]


@dataclass
class Trial:
    """One process: its number, and its exit status, None where it was killed."""

    pid: int
    status: int | None


class Aim:
    """Ends the process before its n-th file operation of a kind, from inside `checkpoint.files`.

    Args:
        kind: one of `AIMS`. count: the n.
    """

    def __init__(self, kind: str, count: int) -> None:
        self.matches, self.left = AIMS[kind], count

    def take(self) -> None:
        """Have this process aimed at."""
        files.fault_hook = self.hook

    def hook(self, operation: str, path: Path) -> None:
        """Count one operation; be gone before the last."""
        if self.matches(operation, path):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal may take its time


MIRROR = "mirror"
"""Name of the folder that the mirrors are in."""
AIMS: dict[str, Callable[[str, Path], bool]] = {
    "in a save": lambda operation, path: ".tmp-step" in str(path) or ".new-" in str(path),
    "at a rename": lambda operation, path: operation in ("rename", "exchange", "sync"),
    "in a deletion": lambda operation, path: (
        ".trash-" in str(path) or (operation == "rename" and path.name.startswith("step-"))
    ),
    "in a load": lambda operation, path: operation in ("open", "read"),
    "in the mirror's upload": lambda _operation, path: MIRROR in path.parts,
}
"""Kinds of moment, as what `files.fault_hook` is told of an operation; the trailing n is drawn at random."""
SPREAD = {
    "in a save": 300,
    "at a rename": 90,
    "in a deletion": 60,
    "in a load": 40,
    "in the mirror's upload": 300,
}
"""The largest n drawn for each kind: about as many as a run of STEPS steps has of them."""
STEPS = 30


def make_shards(folder: Path) -> Path:
    """Write a corpus of the standard library's prose as token shards of 500 pieces."""
    texts = list(itertools.islice(standard_library_prose(), 300))  # all of it takes 4 s of CPU
    for language, part in (("english", 0), ("other", 1)):
        path = folder / "corpus" / language / "text.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[part::2]))
    corpus = [str(folder / "corpus")]
    train_tokenizer(corpus, str(folder / "tokenizer.model"), vocab_size=500, model_type="bpe")
    with ThreadPoolExecutor(1) as executor:  # a worker process would import torch a second time
        preprocess(
            corpus,
            str(folder / "tokenizer.model"),
            str(folder / "shards"),
            test_split=0.05,
            executor=executor,
        )
    return folder / "shards"


def settings(preset: str, shards: Path, run: Path, steps: int, **more: Any) -> TrainConfig:
    """Return the settings of a run that takes seconds and saves all the time."""
    small = dict(SMALL)
    if preset.startswith("gpt2"):
        small["num_key_value_heads"] = 2
    options = {
        "dataset_path": str(shards),
        "output_dir": str(run),
        "max_steps": steps,
        "log_steps": 1,
        "eval_steps": 10,
        "eval_tokens": 200,
        "save_steps": 3,
        "sample_tokens": 4,
        "num_threads": 1,
        "warmup_steps": 2,
        "report": False,
    }
    return build_config(preset, **{**small, **options, **more})


def trial(
    config: TrainConfig,
    log: Path,
    kill_after: float | None = None,
    setup: Callable[[], object] | None = None,
) -> Trial:
    """Run `config` in a forked process, to be ended by SIGKILL after so many seconds, or by what `setup` did to it."""

    def work() -> None:
        if setup is not None:
            setup()
        train(config)

    child = Forked(work, log)
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send(signal.SIGKILL)
    code = child.wait(600)
    return Trial(child.pid, None if code == -signal.SIGKILL else code)


def outcome(run: Path) -> Outcome:
    """Read what a finished run left."""
    losses: dict[int, float] = {}
    twice = 0
    for record in read_history(run / "history.jsonl"):
        if record["kind"] == "train":
            twice += record["step"] in losses
            losses[record["step"]] = record["loss"]
    newest = max((run / "checkpoints").glob("step-*"))
    manifest = read_manifest(newest)
    files = {name: manifest.files[name].sha256 for name in ("model.safetensors", "optimizer.safetensors")}
    return Outcome(losses, twice, files)


def acknowledged(run: Path) -> int:
    """Return the newest step whose checkpoint stands under its final name."""
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def mirrored(mirror: Path) -> int:
    """Return the newest step that counts on a mirror."""
    newest = open_mirror(str(mirror)).newest()
    return newest.step if newest else 0


def resumed_from(run: Path) -> dict[int, int]:
    """Return the step that each session went on from, by the number of its process."""
    records = read_history(run / "history.jsonl")
    return {r["pid"]: r["step"] for r in records if r.get("event") in ("start", "resume")}


class Attack:
    """Runs of one family, each killed and resumed until it ends, until there were enough kills.

    Attributes:
        rows: of the table, by the kind of moment: kills tried, resumed without help from the newest checkpoint there was,
            in runs that ended bit-identical to the uninterrupted one, and checkpoints lost.
    """

    def __init__(self, preset: str, kills: int, shards: Path, folder: Path, steps: int, seed: int) -> None:
        self.preset, self.kills, self.shards, self.folder, self.steps = preset, kills, shards, folder, steps
        self.generator = random.Random(f"{seed} {preset}")
        self.log = folder / "log"
        began = time.monotonic()
        reference = settings(preset, shards, folder / "reference", steps)
        assert trial(reference, self.log).status == 0, self.log.read_text()
        self.duration = time.monotonic() - began
        self.expected = outcome(folder / "reference")
        counts = {"tries": 0, "resumed": 0, "bit_identical": 0, "data_lost": 0}
        kinds = ("at a random moment", *AIMS)
        self.rows: dict[str, dict[str, Any]] = {
            kind: {"fault": f"SIGKILL {kind}, {preset}", **counts} for kind in kinds
        }
        self.turns = itertools.cycle(kinds)

    @property
    def done(self) -> bool:
        """Whether there were enough kills."""
        return sum(row["tries"] for row in self.rows.values()) >= self.kills

    def next_trial(self, config: TrainConfig, begins_at: int) -> tuple[str, Trial]:
        """Start a run, or resume it at a step, and, until there were enough kills, kill it; return the kind of moment."""
        if self.done:
            return "", trial(config, self.log)
        if (kind := next(self.turns)) in AIMS:
            most = max(1, SPREAD[kind] * self.steps // STEPS)
            return kind, trial(config, self.log, setup=Aim(kind, self.generator.randint(1, most)).take)
        left = self.duration * (1 - begins_at / self.steps)
        return kind, trial(config, self.log, kill_after=self.generator.uniform(0, left))

    def run(self, number: int) -> None:
        """Attack one run until it ends, and count."""
        run, mirror = self.folder / f"run-{number}", self.folder / MIRROR / f"run-{number}"
        config = settings(self.preset, self.shards, run, self.steps, mirror=str(mirror))
        suffered: list[str] = []
        went_wrong: list[str] = []
        before = on_mirror = 0
        while True:
            kind, done = self.next_trial(config, before)
            began_at = resumed_from(run).get(done.pid, before)
            if done.status not in (None, 0) or began_at != before:
                went_wrong += suffered[-1:]
            if done.status is not None:
                break
            then_on_mirror = mirrored(mirror)
            # Killed before it was fetched onto an empty machine, the mirror's is the newest still.
            after = max(acknowledged(run), then_on_mirror)
            self.rows[kind]["tries"] += 1
            self.rows[kind]["data_lost"] += after < before or then_on_mirror < on_mirror
            suffered.append(kind)
            before, on_mirror = after, then_on_mirror
            if MIRROR in kind and self.generator.random() < 0.5:
                shutil.rmtree(run)
                before = on_mirror
        same = done.status == 0 and self.is_expected(outcome(run))
        for kind in suffered:
            self.rows[kind]["bit_identical"] += same
            self.rows[kind]["resumed"] += 1
        for kind in went_wrong:
            self.rows[kind]["resumed"] -= 1
        if same and not went_wrong:
            shutil.rmtree(run)
            shutil.rmtree(mirror)

    def is_expected(self, found: Outcome) -> bool:
        """Return whether a run ended as the uninterrupted one, which has every step once."""
        whole = self.expected.steps_twice == 0 and list(self.expected.losses) == list(
            range(1, self.steps + 1)
        )
        return whole and found == self.expected


def campaign(
    preset: str, kills: int, shards: Path, folder: Path, steps: int = STEPS, seed: int = 0
) -> list[dict[str, Any]]:
    """Kill runs until there were `kills`, each kind of moment in turn; resume each to its end; compare.

    Returns:
        A row for each kind of moment, see `Attack.rows`.
    """
    attack = Attack(preset, kills, shards, folder, steps, seed)
    for number in itertools.count():
        if attack.done:
            break
        attack.run(number)
    return list(attack.rows.values())


def whole(row: dict[str, Any]) -> bool:
    """Return whether nothing in a row of the table went wrong."""
    return bool(row["tries"] == row["resumed"] == row["bit_identical"] and row["data_lost"] == 0)


def main() -> None:
    """Run the campaign for one or both families."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="for each family")
    parser.add_argument("--preset", action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shards = make_shards(Path(name))
        rows = []
        for preset in options.preset or ["gpt2-10m", "gemma3-tiny"]:
            folder = Path(name) / preset
            folder.mkdir()
            rows += campaign(preset, options.kills, shards, folder, seed=options.seed)
    passed = all(whole(row) for row in rows)
    for row in rows:
        print("{fault:<50} {tries:>6} {resumed:>6} {bit_identical:>6} {data_lost:>6}".format(**row))
    print(json.dumps({"campaign": "sigkill", "seed": options.seed, "rows": rows, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
